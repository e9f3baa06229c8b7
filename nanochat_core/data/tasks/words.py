"""The words to spell: 321 everyday ones that a small model can learn by heart, or the assets' own list."""

import functools
from pathlib import Path

LISTED = """
able about above actor after again agree alone angel animal answer apple april arrive artist autumn baby
balloon banana basket beach beauty because become bell berry better between bicycle bird black blanket
blossom blue boat book bottle bread bridge bright bring brother brown bubble bucket butter button cabbage
camera candle carpet carrot castle celery chair cheese cherry chicken child circle city class clever cloud
coffee color common copper corner cotton country cousin cream crystal cup curtain dance danger daughter
december desert dinner doctor dollar dolphin donkey door double dragon dream dress eagle early earth eight
eleven engine enough evening every expert fabric family farmer father feather february finger fire flower
follow forest forget fork forty four friend frog fruit garden gentle giraffe glass goat gold good grape
grass green guitar hammer hammock happy harbor heart heavy hello hidden hill hollow honey horse hospital
house hundred hunter ice idea inside island jacket january jelly journey juice jungle kettle kitchen kitten
knife ladder lamp large laugh leather lemon letter library light lion little lizard magic market meadow
mellow melon memory middle milk million minute mirror monkey month moon morning mother mountain mouse movie
museum music napkin nature needle nephew number ocean october office olive onion orange orchard paint panda
paper parrot party pasta peach pencil penguin people pepper piano picture pillow planet pocket potato puddle
puppy purple puzzle quarter queen question quiet rabbit raccoon radio rain raisin ribbon river robin rocket
room saddle salad salmon sandwich school scissors season seven shadow sheep shoulder silver sister sleep
slipper snow soccer spider spoon spring squirrel station stone story street strong student sugar summer
sunday sunset swallow table tailor teacher tennis thirty thunder ticket tiger tomato tomorrow tower train
travel tree triangle trumpet tunnel turtle twenty umbrella uncle under useful valley velvet village violin
visit wagon wallet walnut water weather welcome whale wheel whistle willow window winter wizard wonder
wooden worker yellow yogurt young zebra zipper
"""
WORDS = tuple(LISTED.split())


@functools.cache
def word_list(assets: Path | None) -> tuple[str, ...]:
    """The assets' list of words, one a line; the words above without assets."""
    if assets is None:
        return WORDS
    path = assets / "words_alpha.txt"
    if not path.is_file():
        raise ValueError(f"{path} is missing: run the assets stage")
    return tuple(path.read_text(encoding="utf-8").split())
