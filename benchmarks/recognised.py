"""Are a run's samples what was asked for? A classifier trained on the real images judges them.

    python benchmarks/recognised.py --workdir runs/digits
    python benchmarks/recognised.py --workdir runs/mnist

For runs on the embedded grey digits (`digits`, `mnist`). The classifier, a support vector machine on principal components,
learns from four fifths of the real images (each also shifted by one pixel, for MNIST) and is scored on the rest. Its verdict on
the samples, 50 for each class by default, is the last line.
"""

import argparse

import numpy as np
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC

from jaxdiff import load_run, open_source


def flatten(images: np.ndarray) -> np.ndarray:
    """uint8 [n h w 1] as rows in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def shifted(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images and their copies moved by one pixel up, down, left and right."""
    moves = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]
    return np.concatenate([np.roll(images, move, (1, 2)) for move in moves]), np.tile(labels, len(moves))


def train_classifier(images: np.ndarray, labels: np.ndarray) -> tuple[Pipeline, float]:
    """The classifier and its accuracy on real images that it has not seen."""
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    if images.shape[1] >= 28:  # a pixel is a small step there; on 8x8 images it would make another digit
        train, train_labels = shifted(train, train_labels)
    classifier = make_pipeline(PCA(40, whiten=True, random_state=0), SVC(C=10)).fit(flatten(train), train_labels)
    return classifier, classifier.score(flatten(test), test_labels)


def main() -> None:
    """Train the classifier, make the samples, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--num", type=int, default=500)
    args = parser.parse_args()
    run = load_run(args.workdir)
    source = open_source(run.task.config.data.source)
    real = np.stack([source[i]["image"] for i in range(len(source))])
    real_labels = np.array([source[i]["label"] for i in range(len(source))])
    classifier, accuracy = train_classifier(real, real_labels)
    print(f"classifier: {accuracy:.1%} on {len(real) // 5} unseen real images")
    labels = run.labels([], args.num)
    said = classifier.predict(flatten(run.make(np.arange(args.num), labels)))
    for label in range(run.task.num_classes):
        print(f"  asked for {label}: {np.mean(said[labels == label] == label):.0%} recognised")
    print(f"{args.num} samples of step {run.step}: {np.mean(said == labels):.1%} recognised as the digit asked for")


if __name__ == "__main__":
    main()
