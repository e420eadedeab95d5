"""Features of queries by class, as in the supplement's figure 2 (section G).

A feature is a query's content vector after the last stage. The queries are those that the last
stage's matcher assigns to objects, so every object counts once in every model, whether the model
finds it or not. Queries chosen by score would stand for different objects in each model, and would
not include the objects that a weak model misses.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.evaluation import inference_context
from matplotlib.figure import Figure
from omegaconf import DictConfig
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors
from tabulate import tabulate
from tqdm import tqdm

from ..config.building import build_test_loader, load_dataset
from ..config.preflight import class_names
from ..drawing.style import INKS, shown, spread
from ..errors import UserError
from ..inference.opening import open_model, require_stages
from ..modeling import StageInteractor
from ..modeling.boxes import xyzr_to_corners
from ..modeling.targets import gather_targets

CLASSES = 10  # how many unless the user names some
NEIGHBOURS = 10
METRIC = "cosine"  # distance of features, for the picture and the numbers
PERPLEXITY = 30
MARKERS = "o^sDvP"  # with seven colours, 42 classes look different
PANEL, DPI = 4.2, 150  # PANEL in inches


class Features(NamedTuple):
    """Features of M objects, in the order of the data set."""

    objects: list[tuple[int, int]]  # indices of the image and of the object in it
    classes: np.ndarray  # (M,) indices
    vectors: np.ndarray  # (M, D)


class Separation(NamedTuple):
    """How well classes are separated; all classes have the same weight."""

    silhouette: float  # from -1 to 1
    accuracy: float  # share of objects whose class is (joint) most frequent among the neighbours
    neighbours: int


def compare_features(
    cfgs: Sequence[DictConfig],
    checkpoints: Sequence[str],
    *,
    classes: Sequence[str] = (),
    count: int,
    per_class: int,
) -> tuple[list[str], list[Features]]:
    """Compute the features of the same objects in several models.

    Args:
        cfgs: the config of each model, its data set resolved.
        checkpoints: the file of each model.
        classes: names of the chosen classes; if empty, the `CLASSES` most frequent ones.
        count: most images, spread over the test set.
        per_class: most objects of a class, spread over these images.

    Returns:
        the names of all classes, and the features in each model.

    Raises:
        UserError: a model has no stages, other data than the first one, or features that are not
            finite; a class is unknown or has fewer than two objects; or there is only one class.
    """
    found, first = [], None
    for cfg, checkpoint in zip(cfgs, checkpoints):
        require_stages(cfg)
        dataset = spread(load_dataset(cfg, "test"), count)
        names = class_names(cfg.dataloader.test.dataset)
        images = [(record["image_id"], Path(record["file_name"]).name) for record in dataset]
        first = first or (images, names)
        if (images, names) != first:
            raise UserError(f"{checkpoint}: its config has other test images or classes than that "
                            f"of {checkpoints[0]}")
        if not found:
            chosen = choose_classes(dataset, names, classes)
        model, *_ = open_model(checkpoint, cfg)
        loader = build_test_loader(cfg, dataset)
        found.append(extract(model, tqdm(loader, "images", disable=None), chosen))
        if not np.isfinite(found[-1].vectors).all():
            raise UserError(f"{checkpoint}: its features are not finite, has training diverged?")
    common = set.intersection(*(set(features.objects) for features in found))
    found = [subsample(features, common, per_class) for features in found]
    counts = {names[index]: int((found[0].classes == index).sum()) for index in chosen}
    if min(counts.values()) < 2:
        raise UserError(
            f"too few objects: {', '.join(f'{number} {name}' for name, number in counts.items())}\n"
            "Two of each class are needed: choose others with --classes, or more images with "
            "--count"
        )
    return names, found


def choose_classes(
    dataset: Sequence[dict], names: Sequence[str], wanted: Sequence[str]
) -> list[int]:
    """Return the indices of the classes that are wanted, or of the most frequent ones.

    Raises:
        UserError: a class is unknown, there are fewer than two, or there are no objects.
    """
    items = [item for record in dataset for item in record.get("annotations", [])]
    counts = Counter(item["category_id"] for item in items if not item.get("iscrowd"))
    if not counts:
        raise UserError(f"no objects in {len(dataset)} test images: features need their classes")
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(names[:10])}"
            raise UserError(f"no class {name}: {hint}")
    chosen = [names.index(name) for name in dict.fromkeys(wanted)]
    chosen = chosen or sorted(i for i, number in counts.most_common(CLASSES) if number > 1)
    if len(chosen) < 2:
        raise UserError("there is only one class: name two or more to compare their features")
    return chosen


@torch.no_grad()
def extract(model: StageInteractor, batches, classes: Sequence[int]) -> Features:
    """Collect content vectors of the queries that the last stage matches with some classes.

    Args:
        batches: images with their ``instances``, as in training.
    """
    objects, labels, vectors, number = [], [], [], 0
    with inference_context(model):
        for batch in batches:
            images = model.preprocess(batch)
            outputs = model.decode(images)
            instances = [image["instances"] for image in batch]
            targets = gather_targets(instances, images.image_sizes, model.device)
            logits, boxes = outputs.logits[-1:].float(), outputs.xyzr[-1:].float()
            match = model.criterion.matcher(logits, xyzr_to_corners(boxes), targets)[0]
            contents = outputs.content[-1].float().cpu().numpy()
            for image, matched, content in zip(instances, match.tolist(), contents):
                queries = {place: query for query, place in enumerate(matched) if place >= 0}
                for place, label in enumerate(image.gt_classes.tolist()):
                    if label in classes and place in queries:
                        objects.append((number, place))
                        labels.append(label)
                        vectors.append(content[queries[place]])
                number += 1
    return Features(objects, np.array(labels, dtype=int), np.array(vectors))


def subsample(features: Features, common: set, per_class: int) -> Features:
    """Keep objects that all models have in common, and at most ``per_class`` of each class."""
    places: dict[int, list[int]] = {}
    for place, (key, label) in enumerate(zip(features.objects, features.classes.tolist())):
        if key in common:
            places.setdefault(label, []).append(place)
    kept = sorted(place for chosen in places.values() for place in spread(chosen, per_class))
    objects = [features.objects[place] for place in kept]
    return Features(objects, features.classes[kept], features.vectors[kept])


def separation(vectors: np.ndarray, classes: np.ndarray) -> Separation:
    """Measure how well the features (M, D) of M objects are separated by their classes (M,).

    Distances are `METRIC` in all D dimensions, because the two of t-SNE keep neighbourhoods only.
    The number of neighbours is at most what the smallest class can supply.
    """
    labels, counts = np.unique(classes, return_counts=True)
    number = min(NEIGHBOURS, counts.min() - 1)
    neighbours = NearestNeighbors(n_neighbors=number, metric=METRIC).fit(vectors)
    near = classes[neighbours.kneighbors(return_distance=False)]  # (M, number), without the object
    votes = (near[..., None] == labels).sum(1)  # (M, classes)
    own = (near == classes[:, None]).sum(1)
    silhouettes = silhouette_samples(vectors, classes, metric=METRIC)

    def mean(values: np.ndarray) -> float:
        return float(np.mean([values[classes == label].mean() for label in labels]))

    return Separation(mean(silhouettes), mean(own == votes.max(1)), int(number))


def describe_features(
    features: Features,
    separations: Sequence[Separation],
    labels: Sequence[str],
    names: Sequence[str],
) -> str:
    """Tell how many objects each class has, and how well each model separates them."""
    counts = Counter(features.classes.tolist())
    objects = ", ".join(f"{number} {shown(names[i])}" for i, number in sorted(counts.items()))
    number = separations[0].neighbours
    rows = [[shown(label), *values[:2]] for label, values in zip(labels, separations)]
    header = ["", "silhouette", f"{number} nearest neighbours"]
    table = tabulate(rows, header, disable_numparse=[0], floatfmt=".3f")
    return (
        f"objects: {objects}\n\n{table}\n\n"
        f"Silhouette, and share of objects among whose {number} nearest neighbours no other class "
        f"is more\nfrequent, by {METRIC} distance in all {features.vectors.shape[1]} dimensions. "
        "All classes have the same weight."
    )


def embed(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Map features (M, D) to points (M, 2) by t-SNE."""
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric=METRIC, init="pca", random_state=seed)
    return tsne.fit_transform(vectors)


def draw_features(
    found: Sequence[Features],
    separations: Sequence[Separation],
    labels: Sequence[str],
    names: Sequence[str],
    seed: int,
) -> Figure:
    """Draw a panel per model and a point per object; colour and shape tell its class."""
    size = len(found) * PANEL, PANEL + 0.9
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, features, values, title in zip(panels, found, separations, labels):
        points = embed(features.vectors, seed)
        for number, label in enumerate(np.unique(features.classes)):
            x, y = points[features.classes == label].T
            axes.scatter(x, y, s=14, c=INKS[number % len(INKS)], alpha=0.75, linewidths=0,
                         marker=MARKERS[number % len(MARKERS)], label=shown(names[label]))
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.set_title(
            f"{shown(title)}\nsilhouette {values.silhouette:.2f}, "
            f"{values.neighbours} nearest neighbours {100 * values.accuracy:.0f} %", fontsize=9,
        )
    handles, classes = panels[0].get_legend_handles_labels()
    figure.legend(handles, classes, loc="outside lower center", fontsize=8,
                  ncols=min(len(classes), 4 * len(found)))
    return figure
