"""Questions asked about other examples' pictures: how much of the accuracy comes from looking at them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moslora.data.shapes import Example
    from moslora.tasks.vision.reading import PictureFiles

__all__ = ["pair_with_other_images"]


def pair_with_other_images(asked: Sequence[Example], pictures: PictureFiles) -> dict[int, Example]:
    """Pair held-out examples with others that show as many, but different pictures.

    Args:
        asked: The held-out examples that are answered.
        pictures: Their pictures.

    Returns:
        By an example's position in ``asked`` the other example; without those for which there is none.
    """
    groups: dict[int, list[int]] = {}  # positions by number of pictures
    for number, example in enumerate(asked):
        count = len(pictures.of("heldout", example))
        if count:
            groups.setdefault(count, []).append(number)
    pairs: dict[int, Example] = {}
    for group in groups.values():
        half = len(group) // 2
        for at, number in enumerate(group):
            own = pictures.hashes_of("heldout", asked[number])
            candidates = (asked[group[(at + half + step) % len(group)]] for step in range(len(group)))
            other = next((o for o in candidates if pictures.hashes_of("heldout", o) != own), None)
            if other is not None:
                pairs[number] = other
    return pairs
