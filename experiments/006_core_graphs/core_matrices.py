"""Experiment 006's matrices: pairs of heads as 005 measured them, in nats.

mmi         minimum mutual information, the published measure
ccs         common change in surprisal; its synergy may be negative
surrogate   mmi of heads of two different prompts, which share nothing but the time of a step
excess      mmi - surrogate: what is left for the pair, negative where nothing is
replayed    mmi of an untrained model of the same shape that reads the same tokens
"""

from typing import NamedTuple

import numpy as np

from lens_utils.errors import BadInput

ATOMS = ("sts", "rtr")
READ = {"own_mmi": "mmi", "own_ccs": "ccs", "own_surrogate": "surrogate",
        "replayed_mmi": "replayed"}  # fmt: skip
EDGES = ("all", "top")  # every pair with a positive weight, or the strongest share of all


class Pairs(NamedTuple):
    """One atom by one measure."""

    whole: np.ndarray
    """[head, head] over all prompts."""
    families: np.ndarray
    """[family, head, head]: the same of each category of prompts."""

    def weighed(self, weights: np.ndarray) -> np.ndarray:
        """[head, head]: the mean over categories, each as often as `weights` has it."""
        there = np.tensordot(weights, ~np.isnan(self.families), 1)
        total = np.tensordot(weights, np.nan_to_num(self.families), 1)
        return np.divide(total, there, out=np.full(total.shape, np.nan), where=there > 0)


Matrices = dict[tuple[str, str], Pairs]  # by kind and atom


def gather(upstream: dict[str, dict], heads: int) -> Matrices:
    """All matrices, from what 005 holds. Raises BadInput when they are not of these heads."""
    found = {}
    for name, held in upstream.items():
        for atom in ATOMS:
            whole, families = (held[key].double().numpy() for key in (atom, f"{atom}_by_family"))
            if whole.shape != (heads, heads):
                raise BadInput(
                    f"005's pairs_{name} are of {len(whole)} heads, its scores of {heads}: "
                    "run 005 again with --fresh"
                )
            found[READ[name], atom] = Pairs(whole, families)
    for atom in ATOMS:
        both = zip(found["mmi", atom], found["surrogate", atom], strict=True)
        found["excess", atom] = Pairs(*(one - other for one, other in both))
    return found


def graphs_of(pairs: Matrices) -> list[tuple[str, str, str]]:
    """Kind, atom and edges of every graph."""
    return [(kind, atom, edges) for kind, atom in pairs for edges in EDGES]
