"""Features of queries by class, as the supplement's figure 2 shows them (section G).

A feature is the content vector that a query has after the last stage. Of all queries those count
that the last stage's matcher gives an object: every object then counts once in every model, found
or not. Queries chosen by their score would be other objects in each model, and leave out those that
a weak model misses.
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

CLASSES = 10  # unless they are named
NEIGHBOURS = 10
METRIC = "cosine"  # of features, for the picture and for the numbers
PERPLEXITY = 30
MARKERS = "o^sDvP"  # and seven colours: 42 classes that look different
PANEL, DPI = 4.2, 150  # PANEL in inches


class Features(NamedTuple):
    """Of M objects, in the order of the data set."""

    objects: list[tuple[int, int]]  # index of the image, and of the object in it
    classes: np.ndarray  # (M,) indices
    vectors: np.ndarray  # (M, D)


class Separation(NamedTuple):
    """How well classes are separated; every class counts as much as any other."""

    silhouette: float  # from -1 to 1
    accuracy: float  # share of the objects among whose neighbours no other class is more frequent
    neighbours: int


def compare_features(
    cfgs: Sequence[DictConfig],
    checkpoints: Sequence[str],
    *,
    classes: Sequence[str] = (),
    count: int,
    per_class: int,
) -> tuple[list[str], list[Features]]:
    """Features of the same objects in several models.

    Args:
        cfgs: of each model, the data set settled.
        checkpoints: of each model.
        classes: names of the chosen classes; none chooses the `CLASSES` most frequent ones.
        count: images, at most, spread over the test set.
        per_class: objects of a class, at most, spread over these images.

    Returns:
        names of all classes, and the features in each model.

    Raises:
        UserError: no stages, other data than the first model's, an unknown class, fewer than two
            objects of a class or two classes, or a model whose features are not finite.
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
    found = [thin(features, common, per_class) for features in found]
    check_objects(found[0].classes, chosen, names)
    return names, found


def choose_classes(
    dataset: Sequence[dict], names: Sequence[str], wanted: Sequence[str]
) -> list[int]:
    """Indices of the classes of some names, or of the most frequent classes.

    Raises:
        UserError: an unknown class, fewer than two, or no objects.
    """
    items = [item for record in dataset for item in record.get("annotations", [])]
    counts = Counter(item["category_id"] for item in items if not item.get("iscrowd"))
    if not counts:
        raise UserError(f"no objects in {len(dataset)} test images: features have no classes then")
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(names[:10])}"
            raise UserError(f"no class {name}: {hint}")
    chosen = [names.index(name) for name in dict.fromkeys(wanted)]
    chosen = chosen or sorted(i for i, number in counts.most_common(CLASSES) if number > 1)
    if len(chosen) < 2:
        raise UserError("one class alone: features of two or more can be compared")
    return chosen


@torch.no_grad()
def extract(model: StageInteractor, batches, classes: Sequence[int]) -> Features:
    """Content vectors of the queries that the last stage matches with objects of some classes.

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


def thin(features: Features, common: set, per_class: int) -> Features:
    """Objects common to all models, at most so many of each class, spread over its objects."""
    places: dict[int, list[int]] = {}
    for place, (key, label) in enumerate(zip(features.objects, features.classes.tolist())):
        if key in common:
            places.setdefault(label, []).append(place)
    kept = sorted(place for chosen in places.values() for place in spread(chosen, per_class))
    objects = [features.objects[place] for place in kept]
    return Features(objects, features.classes[kept], features.vectors[kept])


def check_objects(classes: np.ndarray, chosen: Sequence[int], names: Sequence[str]):
    """Raises UserError unless there are two objects or more of each chosen class."""
    counts = {names[index]: int((classes == index).sum()) for index in chosen}
    if min(counts.values()) < 2:
        raise UserError(
            f"too few objects: {', '.join(f'{number} {name}' for name, number in counts.items())}\n"
            "Two of each class are needed: choose others with --classes, or more images with "
            "--count"
        )


def separation(vectors: np.ndarray, classes: np.ndarray) -> Separation:
    """How well the features (M, D) of M objects are separated by their classes (M,).

    Distances are `METRIC` in all D dimensions, for t-SNE's two keep neighbourhoods only. There are
    no more neighbours than the smallest class can supply.
    """
    labels, counts = np.unique(classes, return_counts=True)
    number = min(NEIGHBOURS, counts.min() - 1)
    neighbours = NearestNeighbors(n_neighbors=number, metric=METRIC).fit(vectors)
    near = classes[neighbours.kneighbors(return_distance=False)]  # (M, number), without itself
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
    """The objects of each class, and how well each model separates them."""
    counts = Counter(features.classes.tolist())
    objects = ", ".join(f"{number} {shown(names[i])}" for i, number in sorted(counts.items()))
    number = separations[0].neighbours
    rows = [[shown(label), *values[:2]] for label, values in zip(labels, separations)]
    header = ["", "silhouette", f"{number} nearest neighbours"]
    table = tabulate(rows, header, disable_numparse=[0], floatfmt=".3f")
    return (
        f"objects: {objects}\n\n{table}\n\n"
        f"Silhouette, and share of the objects among whose {number} nearest neighbours no other "
        f"class is more\nfrequent: by {METRIC} distance of all {features.vectors.shape[1]} "
        "dimensions, every class counting as much as any other."
    )


def embed(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Features (M, D) as points (M, 2), by t-SNE."""
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
    """A panel a model, a point an object, its class in colour and shape."""
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
