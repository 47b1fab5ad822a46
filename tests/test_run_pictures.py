import numpy as np
import pytest
from PIL import Image

from swin_dense.errors import ImageError
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.run_pictures import RunPictures
from swin_dense.tools.tasks import task_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["instance", "semantic"])
def parts(request, tiny_words, tmp_path):
    import torch

    name, *overrides = tiny_words(request.param)
    task = task_of(read_recipe(name, overrides))
    images = task.training_data()
    validation = task.validation_data(images.label_map)
    model = task.build_model(len(images.label_map)).eval()
    predictor = task.predictor(model, images.label_map, torch.device("cpu"))
    folder = RunFolder(tmp_path / "run")
    return task, images, folder, lambda count: RunPictures(folder, validation, predictor, count)


def names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def test_training_images_are_drawn_as_augmentation_leaves_them(parts):
    task, images, folder, pictures = parts
    keys = [(0, 3), (1, 3), (0, 1), (0, 2)]
    pictures(3).draw_training(task, images, keys)
    assert names(folder.training_pictures) == [f"{n}_epoch_{e}_image_{i}.png" for n, (e, i) in enumerate(keys[:3])]
    sample = images[0, 3]
    with Image.open(folder.training_pictures / "0_epoch_0_image_3.png") as picture:
        height, width = sample.image.shape[1:]
        assert picture.height >= height and picture.width >= width and picture.height * width >= picture.width * height
        drawn = np.asarray(picture)
    assert drawn.std() > 5


def test_pictures_that_cannot_be_read_are_left_out(parts):
    task, images, folder, pictures = parts

    class Broken:
        label_map = images.label_map

        def __getitem__(self, key):
            if key == (0, 1):
                raise ImageError("is cut short")
            return images[key]

    pictures(3).draw_training(task, Broken(), [(0, 0), (0, 1), (0, 2)])
    assert names(folder.training_pictures) == ["0_epoch_0_image_0.png", "2_epoch_0_image_2.png"]


def test_the_worst_replace_those_of_the_evaluation_before(parts):
    _, _, folder, pictures = parts
    worst = [{"index": index, "name": "x", "errors": 7 - index} for index in range(4)]
    pictures(3).draw_worst(worst[1:])
    assert [name[:10] for name in names(folder.worst_pictures)] == ["1_errors_6", "2_errors_5", "3_errors_4"]
    pictures(3).draw_worst([{"index": 0, "name": "x", "mIoU": 0.0123456}])
    assert [name[:13] for name in names(folder.worst_pictures)] == ["1_mIoU_0.0123"]
    pictures(3).draw_worst([])
    assert not names(folder.worst_pictures)


def test_without_a_count_nothing_is_drawn(parts):
    task, images, folder, pictures = parts
    pictures(0).draw_training(task, images, [(0, 0)])
    pictures(0).draw_worst([{"index": 0, "name": "x", "errors": 1}])
    pictures(0).draw_validation(0, None)
    assert not folder.path.exists()
