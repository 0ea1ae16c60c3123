"""The 25 prompts that DreamBooth's subjects are judged by, for things and for animals.

Source: ``dataset/prompts_and_classes.txt`` of github.com/google/dreambooth, with arXiv:2208.12242; CC BY 4.0.
The first place is the subject's token, the second its class. The authors of MoSLoRA draw with the endings for things
in other words, whatever the subject (``subject_driven_generation/infer.py`` of github.com/wutaiqiang/MoSLoRA), one
picture each in 50 steps.
"""

from __future__ import annotations

__all__ = ["DREAMBOOTH_PROMPTS"]

_ANYWHERE = (
    "a {} {} in the jungle",
    "a {} {} in the snow",
    "a {} {} on the beach",
    "a {} {} on a cobblestone street",
    "a {} {} on top of pink fabric",
    "a {} {} on top of a wooden floor",
    "a {} {} with a city in the background",
    "a {} {} with a mountain in the background",
    "a {} {} with a blue house in the background",
    "a {} {} on top of a purple rug in a forest",
)
_CHANGED = ("a red {} {}", "a purple {} {}", "a shiny {} {}", "a wet {} {}", "a cube shaped {} {}")

# By what the subject is, as ``task.published_prompts`` names it.
DREAMBOOTH_PROMPTS: dict[str, tuple[str, ...]] = {
    "object": (
        *_ANYWHERE,
        "a {} {} with a wheat field in the background",
        "a {} {} with a tree and autumn leaves in the background",
        "a {} {} with the Eiffel Tower in the background",
        "a {} {} floating on top of water",
        "a {} {} floating in an ocean of milk",
        "a {} {} on top of green grass with sunflowers around it",
        "a {} {} on top of a mirror",
        "a {} {} on top of the sidewalk in a crowded street",
        "a {} {} on top of a dirt road",
        "a {} {} on top of a white rug",
        *_CHANGED,
    ),
    "live": (
        *_ANYWHERE,
        "a {} {} wearing a red hat",
        "a {} {} wearing a santa hat",
        "a {} {} wearing a rainbow scarf",
        "a {} {} wearing a black top hat and a monocle",
        "a {} {} in a chef outfit",
        "a {} {} in a firefighter outfit",
        "a {} {} in a police outfit",
        "a {} {} wearing pink glasses",
        "a {} {} wearing a yellow shirt",
        "a {} {} in a purple wizard outfit",
        *_CHANGED,
    ),
}
DREAMBOOTH_PROMPTS["authors"] = tuple(
    template.replace("a ", "A picture of a ", 1) for template in DREAMBOOTH_PROMPTS["object"]
)
