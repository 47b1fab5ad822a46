"""The 150 classes of ADE20K's scene parsing benchmark (Zhou et al. 2017), as a label map and nothing more."""

from collections.abc import Collection

from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import ConfigError

_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""

ADE20K_LABELS = LabelMap(
    names=tuple(name.strip() for name in _NAMES.split(",")), raw_ids=tuple(range(1, 151)), ignored_values=(0,)
)
"""Value i of an annotation picture is class i - 1; value 0 means "other objects" and is ignored."""


def ade20k_labels(first_value: int, ignored_values: Collection[int]) -> LabelMap:
    """Returns `ADE20K_LABELS` after a look at what else is said of the values.

    Args:
        first_value: the value of the first class; 0 where nothing is said.
        ignored_values: values without a class.

    Raises:
        ConfigError: the preset means the values otherwise, as for pictures of another data set.
    """
    if first_value not in (0, ADE20K_LABELS.raw_ids[0]) or not set(ignored_values) <= set(ADE20K_LABELS.ignored_values):
        raise ConfigError(
            f"classes ade20k: the values 1 to 150 are its classes and 0 has none, not first value {first_value} and "
            f"ignored values {[*ignored_values]}. Name your own classes, or how many there are."
        )
    return ADE20K_LABELS
