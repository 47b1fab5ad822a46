"""The pictures of a run: what it is trained on, validation images spread over the set, and those with most mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swin_dense.datasets.batches import Key
from swin_dense.errors import ImageError
from swin_dense.tools.evaluation import spread
from swin_dense.tools.predictors import Predictor
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.tasks import LabelledImages, Task, ValidationData

_NUM_WORST = 4


class RunPictures:
    """Draws into the folder of a run.

    Args:
        folder: The run's folder.
        validation: Its validation images.
        predictor: Its model.
        count: How many validation images are drawn after each evaluation; with 0, nothing is drawn at all.
    """

    def __init__(
        self, folder: RunFolder, validation: ValidationData[Any], predictor: Predictor[Any], count: int
    ) -> None:
        self._folder = folder
        self._validation = validation
        self._predictor = predictor
        self._count = count
        self._drawn = set(spread(count, len(validation.paths)))

    def draw_training(self, task: Task[Any, Any, Any], images: LabelledImages[Any], keys: Sequence[Key]) -> None:
        """Draw what augmentation makes of training images, with their annotations; none that cannot be read."""
        for number, key in enumerate(keys[: self._count]):
            with suppress(ImageError):
                picture = task.sample_picture(images[key], images.label_map)
                _write(self._folder.training_pictures / f"{number}_epoch_{key[0]}_image_{key[1]}.png", picture)

    def draw_validation(self, index: int, prediction: Any) -> None:  # noqa: ANN401 - of the task
        """Draw a validation image and its prediction, if it is one of those that are always drawn."""
        if index in self._drawn:
            self._draw(self._folder.pictures / f"{index:05d}_{self._stem(index)}.png", index, prediction)

    def draw_worst(self, worst_images: Sequence[Mapping[str, Any]]) -> None:
        """Draw the images that an evaluation names as the worst, in place of those of the one before.

        Args:
            worst_images: As in the scores: "index", "name" and what is wrong.
        """
        for path in self._folder.worst_pictures.glob("*.png"):
            path.unlink()
        for place, image in enumerate(worst_images[: min(self._count, _NUM_WORST)], start=1):
            index, wrong = image["index"], [key for key in image if key not in ("index", "name")]
            text = "_".join(f"{key}_{image[key]:.3g}" for key in wrong)
            found = self._predictor.predict_files([self._validation.paths[index]], [self._validation.sizes_hw[index]])
            _, prediction = next(iter(found))
            path = self._folder.worst_pictures / f"{place}_{text}_{self._stem(index)}.png"
            self._draw(path, index, prediction)

    def _draw(self, path: Path, index: int, prediction: Any) -> None:  # noqa: ANN401
        _write(path, self._validation.picture(index, self._predictor, prediction))

    def _stem(self, index: int) -> str:
        return self._validation.paths[index].stem


def _write(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
