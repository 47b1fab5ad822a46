import random

import torch

from swin_dense.training.random_state import (
    preserved_random_state,
    random_state,
    repeated_random_state,
    set_random_state,
)


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


def test_repeated_random_state_repeats_the_draws_inside_and_hides_them():
    state = random_state()
    expected = draw(), draw()
    set_random_state(state)
    inside, outside = [], []
    for _ in range(2):
        with repeated_random_state():
            inside.append(draw())
        outside.append(draw())
    assert inside[0] == inside[1] and tuple(outside) == expected
