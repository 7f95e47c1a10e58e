"""Images for load tests, clean and attacked beforehand: `python -m loadtest.image_sets NAME --data ... --output FILE`.

An .npz file with ``clean`` and ``adversarial``, both uint8 (N, C, H, W): test images, and those of them on which FGSM
made the bare classifier err, rounded to 8 bits as an image file holds them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import typer

from loadtest.connections import Message
from loadtest.messages import Body, gateway_messages

EPSILON = "8/255"


class ImagesUnreadable(ValueError):
    """A file does not hold images for a load test."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(
            f"{path} holds no images for a load test: {reason}; expected what python -m loadtest.image_sets writes."
        )


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Clean and adversarial images, uint8 (N, C, H, W) and (M, C, H, W)."""

    clean: np.ndarray
    adversarial: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file; raises ``ImagesUnreadable``."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                images = cls(arrays["clean"], arrays["adversarial"])
        except (OSError, ValueError, KeyError) as error:
            raise ImagesUnreadable(path, str(error)) from error
        for name, array in (("clean", images.clean), ("adversarial", images.adversarial)):
            if array.dtype != np.uint8 or array.ndim != 4 or not len(array):
                raise ImagesUnreadable(path, f"{name} is {array.dtype} {array.shape}, not uint8 (N, C, H, W)")
        return images

    def write(self, path: Path) -> None:
        """Write a file, and its folder where it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, clean=self.clean, adversarial=self.adversarial)

    def mixed(self, share: float, count: int, seed: int = 0) -> np.ndarray:
        """Return so many images (count, C, H, W) in random order, a share of them adversarial.

        Images are repeated where there are too few. Raises ``ValueError`` for a share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"Expected a share of adversarial images from 0 to 1, got {share}.")
        attacked = round(share * count)
        clean = np.resize(self.clean, (count - attacked, *self.clean.shape[1:]))
        adversarial = np.resize(self.adversarial, (attacked, *self.clean.shape[1:]))
        images = np.concatenate([clean, adversarial])
        return images[np.random.default_rng(seed).permutation(count)]


def traffic(images: ImageSet, share: float, model: str, body: Body, count: int = 256) -> list[Message]:
    """Return requests of one image each to a gateway, a share of them adversarial."""
    return gateway_messages(images.mixed(share, count), model, body)


def main(
    name: Annotated[str, typer.Argument(help="The classifier, as NAME or NAME@VERSION.")],
    output: Annotated[Path, typer.Option(help="The file to write, .npz.")],
    data: Annotated[list[str], typer.Option(help="A folder, a zip (repeat for several), or digits.")],
    store: Annotated[Path, typer.Option(help="Folder of the model store.")] = Path("var/demo/store"),
    count: Annotated[int, typer.Option(help="Test images to take.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
) -> None:
    """Take test images and craft adversarial ones from them."""
    from service.cli.common import failures_told

    with failures_told():
        images = crafted(store, name, data, count, seed)
        images.write(output)
    typer.echo(f"{output}: {len(images.clean)} clean and {len(images.adversarial)} adversarial images.")


def crafted(store: Path, name: str, data: list[str], count: int, seed: int) -> ImageSet:
    """Return test images, and the successes of FGSM on them."""
    import torch

    from defenses.attacks import attack, craft
    from defenses.classifier import Classifier
    from model_store import Store, parse_reference
    from service.datasets import load_dataset
    from service.fit import find_classifier
    from service.repository import MODELS
    from service.served import GRAPH

    fetched = find_classifier(Store.open(store / MODELS), *parse_reference(name))
    manifest = fetched.manifest
    test = load_dataset(data, manifest.input, labels=manifest.labels, split_seed=seed).test
    images, targets = test.images[:count], test.targets[:count]
    made = craft(
        attack(f"fgsm:epsilon={EPSILON}"),
        Classifier.load(fetched.folder / GRAPH).eval(),
        torch.from_numpy(images),
        torch.from_numpy(targets),
        limit=len(images),
        device=torch.device("cpu"),
        seed=seed,
        progress=lambda done, total: None,
    )
    if not made.fooled_rounded.any():
        raise ValueError(f"FGSM with epsilon {EPSILON} fooled {name} on none of {len(images)} images.")
    return ImageSet(images, made.rounded[made.fooled_rounded].numpy())


if __name__ == "__main__":
    typer.run(main)
