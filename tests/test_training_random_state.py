import random

import torch

from swin_dense.training.random_state import preserved_random_state, random_state, set_random_state


def draw():
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1)


def test_set_random_state_repeats_the_draws():
    random.gauss(0, 1)  # leaves a second value in waiting, which is part of the state
    state = random_state()
    first = draw()
    set_random_state(state)
    assert draw() == first


def test_random_state_survives_a_file_of_plain_values(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "state.pt")
    first = draw()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


def test_preserved_random_state_hides_the_draws_inside():
    state = random_state()
    expected = draw()
    set_random_state(state)
    with preserved_random_state():
        draw()
    assert draw() == expected
