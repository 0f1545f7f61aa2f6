"""Are a run's samples digits, and which? A classifier trained on the real images judges them.

    python benchmarks/recognised.py --workdir runs/digits
    python benchmarks/recognised.py --workdir runs/mnist
    python benchmarks/recognised.py --workdir runs/digits_progressive_gan

For runs on the embedded grey digits (`digits`, `mnist`). The classifier, a support vector machine on principal components whose
scores are calibrated to probabilities, learns from four fifths of the real images (each also shifted by one pixel, for MNIST) and
is scored on the rest. Of the samples, 50 for each class by default, it says how sure it is (the mean of the largest probability),
how often each digit occurs and, where the model was asked for a digit, whether it is that one. Also: how many samples are alike,
and how far from the nearest real image they are, beside how far a real image is from the nearest other one (a model that had
learnt images by heart would be at 0). The verdict is the last line.
"""

import argparse

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
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


def train_classifier(images: np.ndarray, labels: np.ndarray) -> tuple[Pipeline, float, float]:
    """The classifier, its accuracy and its mean confidence on real images that it has not seen."""
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    if images.shape[1] >= 28:  # a pixel is a small step there; on 8x8 images it would make another digit
        train, train_labels = shifted(train, train_labels)
    classifier = make_pipeline(PCA(40, whiten=True, random_state=0), CalibratedClassifierCV(SVC(C=10), ensemble=False))
    classifier.fit(flatten(train), train_labels)
    probabilities = classifier.predict_proba(flatten(test))
    return classifier, (probabilities.argmax(1) == test_labels).mean(), probabilities.max(1).mean()


def nearest(images: np.ndarray, real: np.ndarray, itself: bool = False) -> np.ndarray:
    """Distance of each image to the nearest real one: root mean square over the pixels, in levels of 255."""
    finder = NearestNeighbors(n_neighbors=1 + itself).fit(flatten(real))
    return finder.kneighbors(flatten(images))[0][:, -1] * 255 / np.sqrt(images[0].size)


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
    classifier, accuracy, confidence = train_classifier(real, real_labels)
    print(f"classifier: {accuracy:.1%} on {len(real) // 5} unseen real images, mean confidence {confidence:.3f}")
    labels = run.labels([], args.num)
    images = run.make(np.arange(args.num), labels)
    probabilities = classifier.predict_proba(flatten(images))
    said = probabilities.argmax(1)
    counts = ", ".join(f"{digit}: {count}" for digit, count in enumerate(np.bincount(said, minlength=10)))
    print(f"digits seen: {counts}")
    alike = len(images) - len(np.unique(images.reshape(len(images), -1), axis=0))
    print(f"samples that are the same as another: {alike}")
    for name, distances in {
        "a sample to the nearest real image": nearest(images, real),
        "a real image to the nearest other": nearest(real, real, itself=True),
    }.items():
        low, middle, high = np.quantile(distances, (0.05, 0.5, 0.95))
        print(f"levels from {name}: least {distances.min():.1f}, 5% {low:.1f}, median {middle:.1f}, 95% {high:.1f}")
    print(f"mean confidence of the classifier in {args.num} samples: {probabilities.max(1).mean():.3f}")
    if labels is None:
        print(f"{args.num} samples of step {run.step}: {len(np.unique(said))} of 10 digits occur")
        return
    for label in range(run.task.num_classes):
        print(f"  asked for {label}: {np.mean(said[labels == label] == label):.0%} recognised")
    print(f"{args.num} samples of step {run.step}: {np.mean(said == labels):.1%} recognised as the digit asked for")


if __name__ == "__main__":
    main()
