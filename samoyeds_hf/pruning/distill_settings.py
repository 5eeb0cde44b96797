"""What is said to a distillation, and what it says: settings and result.

Some sequences only measure: where the student is no nearer to the teacher on them than it was, it
keeps its pruned weights. A learning rate that suits 75 % is too high where little was lost, and who
distills cannot know it before; so it is checked after a quarter and after half of its steps, and
where it did harm, a quarter of it does the rest, from the pruned weights on. On
tests/assets/tiny-moe (``best`` on 64 x 512 tokens) 80 steps of 8 x 512 tokens at 1e-3 took a KL of
0.680 (1:2:64) to 0.413, but one of 0.0768 (2:4) to 0.1180. Lowered twice, to 6.25e-5 for the last
45 steps, it ends at 0.0671; a better rate for all 80 would have reached more: 1e-4 0.0620, 2.5e-4
0.0626. All that is with a weight of 1 on the hidden states and what was pruned alone, as the
laboratory's rows up to commit 942bd67 are.

Just after a quarter the rate is near its peak, and the KL high with it; what is left takes 30 to
65 % of it. There, 300 steps of 2 x 512 tokens at 1e-3 (KL on sequences held back; before, after a
quarter, at the end): 1:2:32 after block recovery 0.387, 0.370, 0.261 (2.5e-4: 0.333, 0.282), 3:4:64
0.264, 0.258, 0.154, 2:4 0.075, 0.171, 0.072 (lowered: 0.049). A Mixtral of the laboratory, 77 M
tokens, 2268 steps: 1:2:32 after block recovery 0.101, 0.109, 0.045, mixed 0.070, 0.099, 0.034.

The other defaults are those that did best there (1:2:64, the same 327,680 tokens, one seed; KL on
65,536 held-out tokens, perplexity 20.6 before, dense 11.3; CPU, fp32, torch 2.13, commit 7d95485):

==========================================  =====  ==========
what changes, one after the other           KL     perplexity
==========================================  =====  ==========
pruned weights, 80 x 8, hidden states x 10  0.406  14.84
all weights                                 0.374  14.32
160 x 4                                     0.351  13.97
320 x 2                                     0.337  13.76
hidden states x 30                          0.327  13.65
==========================================  =====  ==========

From the last but one, hidden states x 100 end at 0.344, a rate of 2e-3 at 0.369, and 0.3 instead of
0.1 of the rate for what has no mask at 0.359; from the last, a rate of 7e-4 at 0.337, and 640 x 1
at 0.323. By cautious Adam, 1:2:32 after block recovery, 300 x 2: 1e-3 0.292, 1.5e-3 0.301, 2.5e-4
0.315; a second beta of 0.99 0.292. With a tenth or three tenths of the loss of the true next token
in place of the KL, 100 steps end at perplexities of 13.58 and 13.71, by the KL alone at 13.54. From
there (KL 0.405): rates that fall by the power of 0.5 or 1.5, 0.392 and 0.424; a warmup of 0.03 or
0.2, 0.406 and 0.402; no weight on the hidden states in the last half or fifth of the steps, 0.458
and 0.412; a temperature of 1.5, a perplexity of 13.60; 200 x 1, 0.396, then with the power of 0.5
0.397. Little of that is left after more steps: 300 x 2 end at a perplexity of 12.491, 600 x 1 at
12.496, with a rate of 7e-4 at 12.499, with the power of 0.7 at 12.538, all with 2 % held back; with
0.0625 of the sequences 300 x 2 end at 12.450 (commit 6ff8f62).

More steps over the same text help, if less than as many over more of it. 1:2:32 after block
recovery, other text, one seed (KL, perplexity on 65,536 held-out tokens; before 0.558, 15.71, dense
10.25; commit 1ae9b06): 600 sequences once, 300 x 2, 0.318 and 12.43, twice 0.288 and 12.12, four
times 0.277 and 12.01; 1200 once 0.269 and 11.90.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from samoyeds_hf.errors import ConfigError
from samoyeds_hf.pruning.training import check_count, check_number

TRAINED = ("all", "experts")
NOT_KEPT = "no better, so the pruned weights stay; give a lower learning rate"


@dataclass(frozen=True)
class DistillSettings:
    """How a pruned model is distilled.

    Args:
        steps: of the optimizer.
        batch_size: sequences of a step.
        learning_rate: the peak, for weights with 1024 inputs; see :meth:`Masters.step`.
        warmup: share of the steps in which the learning rate rises.
        temperature: of both softmaxes.
        hidden_weight: of the error of the hidden states after each layer (relative to each token,
            averaged over layers) beside the KL; 0 does without it.
        held_back: share of the sequences, at least one of two, that only measure; with 0 none does,
            and the trained weights are kept whatever they are.
        backtrack: whether to start again, with a lower learning rate, where the sequences held back
            say that the first quarter or half of the steps did harm: where little was lost, a
            rate that suits other patterns is too high.
        train: "all", also the router, norms, attention, embeddings and dense experts; or
            "experts", the masked weights alone.
        micro_batch_size: sequences at a time, for memory; None is all of a step's.
        seed: of the order of the sequences.

    Raises:
        ConfigError: a value that cannot be.
    """

    steps: int = 1200
    batch_size: int = 2
    learning_rate: float = 1e-3
    warmup: float = 0.1
    temperature: float = 1.0
    hidden_weight: float = 30.0
    held_back: float = 0.0625
    backtrack: bool = True
    train: str = "all"
    micro_batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("batch_size", self.batch_size)
        if self.micro_batch_size is not None:
            check_count("micro_batch_size", self.micro_batch_size)
        check_number("learning_rate", self.learning_rate, 0, 1)
        check_number("warmup", self.warmup, 0, 1, or_low=True)
        check_number("temperature", self.temperature, 0, math.inf)
        check_number("hidden_weight", self.hidden_weight, 0, math.inf, or_low=True)
        check_number("held_back", self.held_back, 0, 1, or_low=True)
        if type(self.backtrack) is not bool:
            raise ConfigError(f"backtrack must be true or false, found {self.backtrack!r}.")
        check_count("seed", self.seed, 0)
        if self.train not in TRAINED:
            raise ConfigError(f"train must be one of {list(TRAINED)}, found {self.train!r}.")

    def num_held_back(self, samples: int) -> int:
        """How many of so many sequences only measure."""
        if not self.held_back:
            return 0
        return min(max(1, round(self.held_back * samples)), samples - 1)


@dataclass(frozen=True)
class DistillReport:
    """What a distillation did; losses are KL a position, in nats."""

    steps: int
    first: float  # mean loss of the first tenth of the steps
    last: float  # mean loss of the last tenth
    seconds: float
    asked_rate: float  # the peak learning rate of the settings
    learning_rate: float  # and that of the last start, lower where the first did harm
    before: float | None = None  # on the sequences held back; None: there were none
    after: float | None = None
    trials: tuple[float, ...] = ()  # there, where a learning rate was checked

    @property
    def kept(self) -> bool:
        """Whether the trained weights are in the model."""
        return is_better(self.before, self.after)

    @property
    def rates(self) -> str:
        """The peak learning rate asked for, and the one it was lowered to, if it was."""
        if self.learning_rate == self.asked_rate:
            return f"{self.asked_rate:g}"
        return f"{self.asked_rate:g} -> {self.learning_rate:g}"

    @property
    def held_back(self) -> str:
        """The losses on the sequences held back; empty where there are none."""
        if self.before is None or self.after is None:
            return ""
        trials = ", ".join(f"{kl:.4f}" for kl in self.trials)
        meanwhile = f", {trials} meanwhile" if trials else ""
        return f"{self.before:.4f} before{meanwhile}, {self.after:.4f} after"

    def __str__(self) -> str:
        text = f"distilled in {self.steps} steps, {self.seconds:.0f} s"
        if self.learning_rate != self.asked_rate:
            text += f", learning rate lowered to {self.learning_rate:g}"
        text += f": KL to the dense model {self.first:.4f} -> {self.last:.4f} nats a token"
        if not self.held_back:
            return text
        text += f", on sequences held back {self.held_back}"
        return text if self.kept else f"{text}: {NOT_KEPT}"


def is_better(before: float | None, after: float | None) -> bool:
    """Whether what was trained is kept: it is nearer, which NaN is not, or nothing was measured."""
    return before is None or after is None or after < before
