import numpy as np
import pytest
import torch

from swin_dense.tools.evaluation import default_workers, evaluate, flat, spread
from swin_dense.tools.tasks import Evaluator, ValidationData
from swin_dense.training.distributed import Process
from swin_dense.training.loss_terms import LossTerm

CPU = torch.device("cpu")


class Numbers(ValidationData[int]):
    def __init__(self, count):
        self.paths = [f"{index}.png" for index in range(count)]
        self.sizes_hw = [(index + 1, 1) for index in range(count)]
        self.made = []

    def evaluator(self, predictions=None):
        self.made.append(Collector(predictions))
        return self.made[-1]

    def picture(self, index, predictor, prediction):
        return np.zeros((1, 1, 3), np.uint8)

    def target(self, index, size_hw):
        return float(index), size_hw


class Collector(Evaluator[int]):
    def __init__(self, predictions):
        self.predictions = predictions
        self.seen = {}

    def add(self, index, prediction):
        self.seen[index] = prediction

    def merge(self, other):
        self.seen.update(other.seen)

    def finish(self):
        return dict(self.seen)


class Squares:
    """Predicts the square of the number in the file's name; sizes must travel with their paths."""

    gives_losses = True

    def predict_annotated(self, paths, sizes_hw, target_of, workers=0):
        for position, prediction in self.predict_files(paths, sizes_hw, workers):
            number, size_hw = target_of(position, (5, 7))
            assert size_hw == (5, 7) and number**2 == prediction
            yield position, prediction, {"loss_a": LossTerm(torch.tensor(number), 1)}

    def predict_files(self, paths, sizes_hw, workers=0):
        for position, (path, size_hw) in enumerate(zip(paths, sizes_hw, strict=True)):
            number = int(path.removesuffix(".png"))
            assert size_hw == (number + 1, 1)
            yield position, number**2


def test_every_image_is_scored_under_its_own_index(tmp_path):
    told, validation = [], Numbers(5)
    scores = evaluate(
        Squares(),
        validation,
        Process(0, 0, 1, CPU),
        predictions=tmp_path,
        on_prediction=lambda *pair: told.append(pair),
    )
    assert scores == {index: index**2 for index in range(5)}
    assert told == [(index, index**2) for index in range(5)]
    assert validation.made[0].predictions == tmp_path


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_shares_of_the_processes_are_disjoint_and_whole(world_size):
    shares = [evaluate(Squares(), Numbers(5), Process(rank, 0, world_size, CPU)) for rank in range(world_size)]
    indices = [index for share in shares for index in share]
    assert sorted(indices) == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_parts_of_other_processes_are_merged(monkeypatch):
    other = Collector(None)
    other.seen = {1: 1}
    monkeypatch.setattr("swin_dense.tools.evaluation.gather_objects", lambda evaluator: [evaluator, other])
    assert evaluate(Squares(), Numbers(2), Process(0, 0, 2, CPU)) == {0: 0, 1: 1}
    monkeypatch.setattr("swin_dense.tools.evaluation.gather_objects", lambda evaluator: None)
    assert evaluate(Squares(), Numbers(2), Process(1, 1, 2, CPU)) is None


def test_losses_are_those_of_all_images_and_change_no_prediction():
    plain = evaluate(Squares(), Numbers(5), Process(0, 0, 1, CPU))
    scores = evaluate(Squares(), Numbers(5), Process(0, 0, 1, CPU), with_losses=True)
    assert scores.pop("losses") == {"loss_a": 2.0} and scores == plain


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_losses_of_other_processes_are_merged(world_size, monkeypatch):
    sent = []  # by each process its evaluator and its losses, the main process's last

    def gather(value):
        sent.append(value)
        return None if rank else sent[-1:] + sent[-3::-2]

    monkeypatch.setattr("swin_dense.tools.evaluation.gather_objects", gather)
    for rank in reversed(range(world_size)):
        scores = evaluate(Squares(), Numbers(5), Process(rank, rank, world_size, CPU), with_losses=True)
        assert (scores is None) == (rank > 0)
    assert scores == {"losses": {"loss_a": 2.0}, **{index: index**2 for index in range(5)}}


def test_models_that_give_no_losses_are_scored_without():
    predictor = Squares()
    predictor.gives_losses = False
    assert "losses" not in evaluate(predictor, Numbers(5), Process(0, 0, 1, CPU), with_losses=True)


def test_default_workers_leave_the_cores_to_training_on_the_cpu():
    assert default_workers(Process(0, 0, 1, CPU)) == 0
    assert 1 <= default_workers(Process(0, 0, 1000, torch.device("cuda"))) <= 8
    assert default_workers(Process(0, 0, 1, torch.device("cuda"))) >= 1


def test_flat_names_are_columns():
    assert flat({"mask AP50": 0.5, "mIoU": None}, "val") == {"val_mask_AP50": 0.5, "val_mIoU": None}


@pytest.mark.parametrize(
    ("count", "of", "expected"),
    [(3, 9, [0, 4, 8]), (8, 3, [0, 1, 2]), (0, 5, []), (1, 5, [0]), (2, 1, [0]), (3, 0, []), (2, 97, [0, 96])],
)
def test_spread_takes_first_and_last(count, of, expected):
    assert spread(count, of) == expected
