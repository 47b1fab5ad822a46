"""Numbers that every part must agree on. Needs no torch."""

IGNORED_LABEL = 255
"""The class index, in every label map of this library, of a pixel that neither trains nor counts."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of each channel of ImageNet's training pictures, RGB in [0, 1]: what all published weights expect."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation, likewise."""
