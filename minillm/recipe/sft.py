"""What learning from conversations adds to a recipe: its section, its objective, and what it reads."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from minillm.data.chat import find_template
from minillm.data.config import ConversationsConfig
from minillm.data.conversation_store import open_conversations
from minillm.data.corpus import with_questions
from minillm.data.masked import TurnsConfig
from minillm.data.mixture import Source
from minillm.objectives import NextToken, NoisyNextToken
from minillm.recipe.tuning import AnswersConfig, TuningConfig, with_template
from minillm.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer


@dataclass(frozen=True)
class SFTConfig(AnswersConfig, TurnsConfig):
    """What of conversations is learned, by which weights, and how what was learned is measured."""

    neftune: Annotated[float, "noise on embeddings in training, uniform of this / sqrt(T D); 5 is usual", ">= 0"] = 0.0

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        problems = super().problems()
        if self.predict and self.train_on == "all":
            problems.append("predict: with train_on all, nobody's answer is told from the rest; leave one of them out")
        return problems


@dataclass(frozen=True)
class FineTuningConfig(TuningConfig):
    """A run that learns from conversations."""

    SECTION: ClassVar[str] = "sft"

    data: ConversationsConfig = field(default_factory=ConversationsConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        problems = super().problems()
        if self.sft.neftune and self.parallel.tp > 1:
            problems.append("sft.neftune: tensor-parallel ranks would each add other noise; leave one of them out")
        return problems


def answers_objective(config: FineTuningConfig, vocab_size: int) -> NextToken:
    """The loss of the answers, with noise on the embeddings where it is asked for."""
    penalties = {"label_smoothing": config.train.label_smoothing, "z_loss": config.train.z_loss}
    if config.sft.neftune:
        return NoisyNextToken(vocab_size, alpha=config.sft.neftune, **penalties)
    return NextToken(vocab_size, **penalties)


def open_chats(
    config: FineTuningConfig, data: ConversationsConfig, tokenizer_config: TokenizerConfig
) -> tuple[Tokenizer, list[Source]]:
    """The tokenizer, and the conversations of each source as the model is given them."""
    tokenizer = train_tokenizer((), tokenizer_config)
    template = find_template(with_template(config, tokenizer).sft.template, tokenizer)
    return tokenizer, open_conversations(with_questions(data), config.sft, template, tokenizer)
