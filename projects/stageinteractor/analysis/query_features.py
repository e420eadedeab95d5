"""Features of queries by class, as in the supplement's figure 2 (section G).

A feature is a query's content vector after the last stage. The queries are those that the last
stage's matcher assigns to objects, so every object counts once in every model, whether the model
finds it or not. Queries chosen by score would stand for different objects in each model, and would
not include the objects that a weak model misses.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.evaluation import inference_context
from matplotlib.figure import Figure
from omegaconf import DictConfig
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from tqdm import tqdm

from ..config.building import build_test_loader, load_dataset
from ..config.preflight import class_names
from ..drawing.style import INKS, shown, spread
from ..errors import UserError
from ..inference.opening import open_model, require_stages
from ..modeling import StageInteractor
from ..modeling.boxes import xyzr_to_corners
from ..modeling.targets import gather_targets

IMAGES = 500  # of the test set at most
CLASSES, PER_CLASS = 10, 200  # the most frequent classes, and the most objects of each
METRIC = "cosine"  # distance of features, for the picture and the numbers
PERPLEXITY = 30
MARKERS = "o^sDvP"  # with seven colours, 42 classes look different
PANEL, DPI = 4.2, 150  # PANEL in inches


def draw_features(
    cfgs: Sequence[DictConfig], checkpoints: Sequence[str], labels: Sequence[str]
) -> Figure:
    """Draw a panel per model and a point per object, and print how well classes are separated.

    The silhouette in a title is the mean over classes, from -1 to 1. It is computed from the
    features themselves, because the two dimensions of t-SNE keep neighbourhoods only.

    Args:
        cfgs: the config of each model, its data set resolved.
        checkpoints: the file of each model.
        labels: the title of each model.

    Raises:
        UserError: a model has no stages, other data than the first one or features that are not
            finite, or there are fewer than two classes that have two objects.
    """
    size = len(cfgs) * PANEL, PANEL + 0.9
    figure, first = Figure(figsize=size, dpi=DPI, layout="constrained"), None
    panels = figure.subplots(1, len(cfgs), squeeze=False)[0]
    for axes, cfg, checkpoint, title in zip(panels, cfgs, checkpoints, labels):
        require_stages(cfg)
        dataset = spread(load_dataset(cfg, "test"), IMAGES)
        names = class_names(cfg.dataloader.test.dataset)
        data = [(record["image_id"], Path(record["file_name"]).name) for record in dataset], names
        first = first or data
        if data != first:
            raise UserError(f"{checkpoint}: its config has other test images or classes than that "
                            f"of {checkpoints[0]}")
        model, *_ = open_model(checkpoint, cfg)
        loader = build_test_loader(cfg, dataset)
        classes, vectors = choose(*extract(model, tqdm(loader, "images", disable=None)))
        if not np.isfinite(vectors).all():
            raise UserError(f"{checkpoint}: its features are not finite, has training diverged?")
        value = separation(vectors, classes)
        print(f"{shown(title)}: silhouette {value:.3f}, {len(classes)} objects")
        points = embed(vectors)
        for number, label in enumerate(np.unique(classes)):
            x, y = points[classes == label].T
            axes.scatter(x, y, s=14, c=INKS[number % len(INKS)], alpha=0.75, linewidths=0,
                         marker=MARKERS[number % len(MARKERS)], label=shown(names[label]))
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.set_title(f"{shown(title)}\nsilhouette {value:.2f}", fontsize=9)
    handles, classes = panels[0].get_legend_handles_labels()
    figure.legend(handles, classes, loc="outside lower center", fontsize=8,
                  ncols=min(len(classes), 4 * len(cfgs)))
    return figure


@torch.no_grad()
def extract(model: StageInteractor, batches: Iterable[list[dict]]) -> tuple[np.ndarray, np.ndarray]:
    """Collect content vectors of the queries that the last stage matches with objects.

    Args:
        batches: images with their ``instances``, as in training.

    Returns:
        the classes (M,) and the features (M, D) of the M objects, in the order of the data set.
    """
    classes, vectors = [], []
    with inference_context(model):
        for batch in batches:
            images = model.preprocess(batch)
            outputs = model.decode(images)
            instances = [image["instances"] for image in batch]
            targets = gather_targets(instances, images.image_sizes, model.device)
            logits, boxes = outputs.logits[-1:].float(), outputs.xyzr[-1:].float()
            match = model.criterion.matcher(logits, xyzr_to_corners(boxes), targets)[0].cpu()
            contents = outputs.content[-1].float().cpu()
            for image, matched, content in zip(instances, match, contents):
                queries = matched.argsort()[(matched < 0).sum():]  # in the order of the objects
                classes.append(image.gt_classes[matched[queries]])
                vectors.append(content[queries])
    return torch.cat(classes).numpy(), torch.cat(vectors).numpy()


def choose(classes: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep objects of the most frequent classes: at most `PER_CLASS` of each, evenly spread.

    Raises:
        UserError: fewer than two classes have two objects.
    """
    frequent = [label for label, count in Counter(classes.tolist()).most_common(CLASSES)
                if count > 1]
    if len(frequent) < 2:
        raise UserError("the test images have fewer than two classes with two objects to compare")
    kept = [spread(np.flatnonzero(classes == label), PER_CLASS) for label in frequent]
    kept = np.sort(np.concatenate(kept))
    return classes[kept], vectors[kept]


def separation(vectors: np.ndarray, classes: np.ndarray) -> float:
    """Compute the silhouette of features (M, D) by class, with the same weight for all classes."""
    values = silhouette_samples(vectors, classes, metric=METRIC)
    return float(np.mean([values[classes == label].mean() for label in np.unique(classes)]))


def embed(vectors: np.ndarray) -> np.ndarray:
    """Map features (M, D) to points (M, 2) by t-SNE."""
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric=METRIC, init="pca", random_state=0)
    return tsne.fit_transform(vectors)
