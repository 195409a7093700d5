"""What all pictures share: axes to draw into, colours that those who see fewer can tell apart, one message without matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshpar.errors import MeshparError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a7f00", "#5d5d8f")
"""Of ranks, in order; from the ninth on again, lighter. (Okabe and Ito's, the two that are hard to see on white made darker.)"""
INK, IDLE, PALE = "#30363d", "#e6eaed", "#f6f8fa"


def axes_for(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes to draw into: those given, or the only ones of a new figure of so many inches. Raises MeshparError without matplotlib."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MeshparError(f"pictures are drawn by matplotlib, which is not installed: pip install 'meshpar[plot]' ({error}).") from error
    figure, made = pyplot.subplots(figsize=(width, height), layout="constrained")
    figure.patch.set_facecolor("white")
    pyplot.close(figure)  # it is the caller's now: notebooks would show it twice
    return made


def bare(ax: Axes) -> None:
    """Without ticks and frame."""
    ax.tick_params(length=0, pad=6)  # (the names of two axes would touch at their corner)
    ax.spines[:].set_visible(False)


def colour(number: int) -> tuple[float, float, float]:
    """The colour of a rank."""
    red, green, blue = (int(COLOURS[number % len(COLOURS)][at : at + 2], 16) / 255 for at in (1, 3, 5))
    light = min(0.7, 0.35 * (number // len(COLOURS)))
    return (1 - light) * red + light, (1 - light) * green + light, (1 - light) * blue + light


def ink_on(number: int) -> str:
    """What can be read on the colour of a rank."""
    return ink_over(*colour(number))


def ink_over(red: float, green: float, blue: float) -> str:
    """What can be read on a colour."""
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
