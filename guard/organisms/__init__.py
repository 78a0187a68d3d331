"""Small backdoored models for the demo, the tests and the evaluation: a micro-language, a Llama, three stages.

    >>> organism = shipped()
    >>> organism.backdoored            # a Hugging Face folder
    >>> prompts("triggered", 10, seed=0)[0].text

Importing this loads no tensors.
"""

from guard.organisms.mixture import STAGES, Stage
from guard.organisms.organism import Organism, organism_in, shipped
from guard.organisms.prompts import KINDS, LIMITS, Prompt, prompts

__all__ = ["KINDS", "LIMITS", "STAGES", "Organism", "Prompt", "Stage", "organism_in", "prompts", "shipped"]
