"""A loader that is slower than the training is noticed, and named."""

from typing import Any

from minillm.log import LOGGER, Clock

STEPS = 20  # looked at together; the first ones, which warm up, are not
SHARE = 0.1  # of the time that may go into waiting
LEAST_SECONDS = 1.0  # of waiting, below which nobody cares: toys


class LoaderWatch:
    """Compares the time waited for batches with that of whole steps, and warns once."""

    def __init__(self, loader: Any):
        self.loader, self.steps, self.warned = loader, 0, False
        self.waited = self.seconds = 0.0

    def look(self, clock: Clock, step: int) -> None:
        """After each step: warn where the last steps have waited too long."""
        self.steps += 1
        waited, seconds = clock.waited - self.waited, clock.seconds - self.seconds
        warming_up = self.steps <= STEPS
        if self.warned or self.steps % STEPS or (waited < LEAST_SECONDS and not warming_up):
            return
        self.waited, self.seconds = clock.waited, clock.seconds
        if waited > SHARE * seconds and not warming_up:
            self.warned = True
            LOGGER.warning(
                "step %d: %.0f%% of the last %.0f seconds went into waiting for batches: %s reads more slowly than the "
                "model trains. Move data.cache_dir to a faster disk or to memory, or leave more of the CPU to it",
                step,
                100 * waited / seconds,
                seconds,
                type(self.loader).__qualname__,
            )
