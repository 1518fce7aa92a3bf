"""ZipAR's second step (arXiv 2412.04062): each row's window is as wide as its first token needs."""

import torch
from torch import Tensor

from autoregressive.models.sampling import revise
from autoregressive.models.schedule import Pass


class AdaptiveWindow:
    """Keeps a row waiting until a longer row above no longer speaks against its first token.

    From the paper: the first token is drawn once the row above has ``window`` tokens, the smallest that a row may
    begin with. In the next pass the row above has one more, and the token must pass the test of speculative decoding
    against the distribution that follows from it (:func:`~autoregressive.models.sampling.revise`). If it passes, the
    row goes on from it; if not, it is drawn anew, and tested with one more token yet. Once the row above is whole
    nothing is left to wait for. So no row begins less than ``window + 1`` tokens behind the row above. As the test also
    decides when to stop, first tokens are not distributed exactly as with any one window.

    Chosen here, as the paper decodes one image:

    * The rows of a batch begin together, when the tokens of all images have passed; one that has passed stays as it is.
      So an image depends on the batch that it is in, and on average rows wait longer in larger batches.
    * For each test the row above's end goes in again at the place before the row, since its keys and values change
      with what it attends to. To a cache that is one more arrival, in the slot of the one before.
    * The most likely token, where nothing is drawn, passes if it is still the most likely one.

    Each test waits for the device.

    Args:
        noise: ``[2, N, B]`` in [0, 1), for the tests and for what is drawn anew. Test t of the row that begins at
            position p takes ``[:, p + t]``, t = 1, 2, ...

    Attributes:
        waiting: the position of the token that may change, as :meth:`~autoregressive.models.schedule.Schedule.walk`
            takes it; there is one at most, as no row goes on before the row above.
    """

    def __init__(self, noise: Tensor):
        self.noise = noise
        self.waiting: set[int] = set()

    def settle(self, step: Pass, probs: Tensor, drawn: Tensor) -> None:
        """Test what was to be tested, and note what is to be tested next.

        Args:
            step: the pass.
            probs: ``[B, P, V]``, the distributions of the P tokens that it draws.
            drawn: int64 ``[B, P]``, the tokens as drawn from them; what another token is kept or drawn for is
                overwritten.
        """
        for index, position in enumerate(step.draws):
            early = position - 1 in step.stand_ins
            if position in self.waiting:
                self.tests += 1
                test, again = self.noise[:, position + self.tests]
                token, stays = revise(self.token, self.probs, probs[:, index], test, again)
                self.token = torch.where(self.passed, self.token, token)
                self.passed = self.passed | stays
            elif early:
                self.tests, self.token = 0, drawn[:, index].clone()
                self.passed = torch.zeros_like(self.token, dtype=torch.bool)
            else:
                continue
            self.probs = probs[:, index]
            drawn[:, index] = self.token
            self.waiting.clear()
            if early and not (self.tests and self.passed.all()):
                self.waiting.add(position)
