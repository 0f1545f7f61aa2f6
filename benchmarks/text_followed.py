"""Do a run's pictures show what the prompts ask for? A rule on the pixels judges, nothing in it is learned.

    python benchmarks/text_followed.py --workdir runs/shapes_text --num 200
    python benchmarks/text_followed.py --workdir runs/shapes_text --num 200 --split held_out
    python benchmarks/text_followed.py --workdir runs/shapes_text --num 200 --guidance 4 --steps 100 --sampler dpm++2m
    python benchmarks/text_followed.py --self_test

For runs on the source `shapes`. Prompt i is drawn with seed i, as the run's own sampling settings say unless flags change them.
A picture counts if every object that its prompt names is found in it, colour and shape together; the last line is the
percentage of such pictures. "and nothing else" also wants no further object. `--self_test` judges pictures of the source
itself, clean, noisy and blurred: so the rule is judged.

The rule: what has colour stands out from the grey background; connected pixels are one object; hue decides its colour;
its shape is that of the five ideal silhouettes (of the object's own area and centre, sharp or a little soft) which differs
least from it, and "unknown" if all differ much.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from jaxdiff.data.nameless import chroma
from jaxdiff.data.outlines import coverage
from jaxdiff.data.scenes import COLOURS, SHAPES, TWO_OBJECTS, Scene, parse_caption, prompts
from jaxdiff.data.shapes import IMAGE_SIZE, ShapesSource, open_shapes
from jaxdiff.data.transforms import resize_shorter_side
from jaxdiff.diffusion.samplers import SAMPLERS

Found = list[tuple[str, str]]
MIN_ALPHA = 0.4  # chroma of a pixel that belongs to an object, as a part of its colour's own
MIN_AREA = 14 / 32**2  # smaller specks are no objects; the smallest of the source has 31 / 32^2
SOFTNESS = (0.0, 0.5, 0.8)  # blur of the ideal silhouettes, in 32nds of the side: sampled pictures are a bit soft
MAX_DIFFERENCE = 0.3  # a shape that differs by more than this part of its area is "unknown"
UNIT_AREAS = {shape: float(coverage(shape, 80, 80, 50, (160, 160)).sum()) / 50**2 for shape in SHAPES}
CHROMA = {colour: chroma(np.array(rgb)) for colour, rgb in COLOURS.items()}


def judge(image: UInt8[np.ndarray, "h w 3"]) -> Found:
    """(colour, shape) of every object found, the largest first; the shape is "unknown" if none fits."""
    pixels = chroma(image)
    colours = np.array(list(CHROMA.values()))
    lengths = np.linalg.norm(colours, axis=-1)
    towards = pixels @ (colours / lengths[:, None]).T  # [h w colours]; the nearest hue has the largest
    nearest = towards.argmax(-1)
    alpha = towards / lengths  # 1 on an object, 0 on the ground, between on its outline
    there = np.take_along_axis(alpha, nearest[..., None], -1)[..., 0] > MIN_ALPHA
    found = []
    components, num = ndimage.label(there)
    for label in range(1, num + 1):
        component = components == label
        for k, colour in enumerate(CHROMA):  # as a rule one colour; two where objects touch
            part = component & (nearest == k)
            around = ndimage.binary_dilation(part, iterations=2) & ~(component & ~part)
            silhouette = np.where(around, np.clip(alpha[..., k], 0, 1.2), 0)
            area = float(silhouette[part].sum())
            if area > MIN_AREA * there.size and part.sum() > 0.25 * component.sum():
                found.append((area, colour, nearest_shape(silhouette)))
    return [(colour, shape) for _, colour, shape in sorted(found, reverse=True)]


def nearest_shape(silhouette: Float[np.ndarray, "h w"]) -> str:
    """The shape whose ideal silhouette of the same area and centre differs least from this one."""
    area = silhouette.sum()
    y, x = (float((silhouette * (axis + 0.5)).sum() / area) for axis in np.indices(silhouette.shape))
    differences = {}
    for shape, unit_area in UNIT_AREAS.items():
        sharp = coverage(shape, x, y, np.sqrt(area / unit_area), silhouette.shape)
        ideals = (ndimage.gaussian_filter(sharp, blur * len(sharp) / 32) for blur in SOFTNESS)
        differences[shape] = min(float(np.abs(silhouette - ideal).sum() / area) for ideal in ideals)
    best = min(differences, key=differences.__getitem__)
    return best if differences[best] < MAX_DIFFERENCE else "unknown"


def shows(found: Found, wanted: Found) -> bool:
    """Whether every object wanted is among those found, each as often as it is wanted."""
    return not Counter(wanted) - Counter(found)


def asked_for(prompt: str) -> Found:
    """(colour, shape) of every object that a prompt names."""
    return named(parse_caption(prompt))


def named(scene: Scene) -> Found:
    """(colour, shape) of every object; raises ValueError where one has no name."""
    pairs = [(thing.colour, thing.shape) for thing in scene.things if thing.colour and thing.shape]
    if len(pairs) < len(scene.things):
        raise ValueError(f"colour and shape must both be named, and are not in {scene}")
    return pairs


def make_images(options: argparse.Namespace, texts: Sequence[str]) -> UInt8[np.ndarray, "n h w 3"]:
    """One picture a prompt, from the run that the flags name, made as they say."""
    import jaxdiff

    return jaxdiff.text_to_image(
        jaxdiff.load_run(options.workdir),
        texts,
        range(options.seed, options.seed + len(texts)),
        guidance=options.guidance,
        steps=options.steps,
        sampler=options.sampler,
    )


def percent(marks: Sequence[bool]) -> str:
    """Share and number of marks, as in: 93.5% of 200."""
    return f"{100 * np.mean(marks):.1f}% of {len(marks)}" if marks else "none"


def report(images: Sequence[np.ndarray], texts: Sequence[str]) -> float:
    """Print the percentages by colour, by shape, by number of objects and in all; return the last."""
    wanted = [asked_for(text) for text in texts]
    verdicts = [judge(image) for image in images]
    marks = [shows(found, want) for found, want in zip(verdicts, wanted, strict=True)]
    each = [(pair, pair in found) for found, want in zip(verdicts, wanted, strict=True) for pair in want]
    for position, names in enumerate((tuple(COLOURS), SHAPES)):
        for name in names:
            print(f"{name:>10}: shown in {percent([right for pair, right in each if pair[position] == name])} objects")
    for count, words in ((1, "one object"), (2, "two objects")):
        print(
            f"{words}: {percent([mark for mark, want in zip(marks, wanted, strict=True) if len(want) == count])} pictures"
        )
    exact = [sorted(found) == sorted(want) for found, want in zip(verdicts, wanted, strict=True)]
    print(f"colour and shape asked for, and nothing else: {percent(exact)} pictures")
    print(f"colour and shape asked for: {percent(marks)} pictures")
    return float(np.mean(marks))


def softened(image: np.ndarray, noise: float, blur: float, rng: np.random.Generator) -> np.ndarray:
    """Blurred by a Gaussian of `blur` pixels, then with normal noise of standard deviation `noise` / 255."""
    smooth = ndimage.gaussian_filter(image.astype(np.float64), (blur, blur, 0))
    return np.clip(np.rint(smooth + noise * rng.standard_normal(image.shape)), 0, 255).astype(np.uint8)


def accuracy(
    source: ShapesSource, num: int, size: int, noise: float = 0.0, blur: float = 0.0
) -> tuple[list[bool], list[bool]]:
    """Whether the rule finds exactly the truth: for each of the first `num` pictures of named things, one or two."""
    rng, marks = np.random.default_rng(0), ([], [])
    scenes = ((i, source.scene(i)) for i in range(len(source)))
    all_named = ((i, scene) for i, scene in scenes if all(thing.colour and thing.shape for thing in scene.things))
    for i, scene in itertools.islice(all_named, num):
        truth = named(scene)
        image = softened(resize_shorter_side(source[i]["image"], size), noise, blur, rng)
        marks[len(truth) - 1].append(sorted(judge(image)) == sorted(truth))
    return marks


def self_test(num: int, size: int) -> None:
    """Print the rule's accuracy on pictures of the source itself."""
    for split in ("test", "held_out"):
        for noise, blur in ((0, 0), (8, 0), (0, 0.5), (8, 0.5), (8, 0.8)):
            one, two = accuracy(open_shapes(split), num, size, noise, blur)
            print(
                f"{split}, {size}x{size}, noise {noise}/255, blur {blur} pixels: right on {percent(one)} pictures of one "
                f"object, {percent(two)} of two"
            )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", help="of a run on the source shapes")
    parser.add_argument("--num", type=int, default=200, help="prompts, or pictures of the self test")
    parser.add_argument("--split", choices=("train", "held_out"), default="train", help="combinations asked for")
    parser.add_argument(
        "--seed", type=int, default=0, help="prompt i is drawn with seed + i; it also chooses the prompts"
    )
    parser.add_argument("--two_objects", type=float, default=TWO_OBJECTS, help="fraction of prompts with two objects")
    parser.add_argument("--self_test", action="store_true", help="judge pictures of the source itself")
    parser.add_argument("--image_size", type=int, default=32, help="of the self test (at most %(default)s)")
    group = parser.add_argument_group("sampling (defaults: the run's own)")
    group.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 = none")
    group.add_argument("--steps", type=int, help="of the sampler")
    group.add_argument("--sampler", choices=SAMPLERS, help="%(choices)s")
    options = parser.parse_args(argv)
    if not options.self_test and not options.workdir:
        parser.error("give --workdir or --self_test")
    return options


def main() -> None:
    """Command line."""
    options = parse_args()
    if options.self_test:
        self_test(options.num, min(options.image_size, IMAGE_SIZE))
        return
    texts = prompts(options.split, options.num, options.seed, options.two_objects)
    report(make_images(options, texts), texts)


if __name__ == "__main__":
    main()
