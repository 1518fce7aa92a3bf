"""TopK-V (arXiv 2506.18226, section 4.1): of the tokens between prefix and local window, keep the least redundant."""

from torch import Tensor

from adsa.policies.base import Policy


class Adsa(Policy):
    """Eq. 4: the tokens whose V is, on average, least similar to that of all cached tokens stay.

    The paper's prose once says the opposite, against its own equation and purpose; the equation holds here.
    """

    name = "adsa"
    similarity_of = "v"

    def score(self, layer) -> Tensor:
        return layer.similarities().neg_()


class AdsaInverse(Adsa):
    """The opposite of Eq. 4, as a control: the most redundant tokens stay."""

    name = "adsa_inverse"

    def score(self, layer) -> Tensor:
        return super().score(layer).neg_()
