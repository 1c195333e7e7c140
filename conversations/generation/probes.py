"""samples.jsonl of a stage that trains on given answers: what the model says to a few prompts before and after."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from conversations import render_conversation
from conversations.answers.prompts import answer_text, prompt_text
from conversations.generation.generating import padding_of
from conversations.row import Message
from conversations.run_files import SAMPLES as SAMPLES_FILE
from deepseek_v2_modeling.inference import end_tokens, generate_answers
from deepseek_v2_modeling.training import RunTrainerMixin, append_lines, is_sharded

SAMPLED_SHARE = 0.02  # sampled tokens as a fraction of a run's training tokens, at most: sampling is slower
FEWEST_SAMPLE_TOKENS = 8
SAMPLES, SAMPLE_TOKENS = 6, 64  # of a stage: prompts, and the longest answer

Probe = tuple[list[Message], str | None]  # a prompt, and the answer that its row has


class ProbedTrainerMixin(RunTrainerMixin):
    """A trainer that answers probes; put it before one of TRL's.

    probes: the prompts. sample_tokens: the maximum length of an answer; in short runs it is reduced, so that sampling
    takes only a small part of the time.
    """

    # Of transformers' Trainer.
    args: Any
    model: Any
    state: Any
    train_dataset: Any
    processing_class: Any

    def __init__(self, *args: Any, probes: Sequence[Probe] = (), sample_tokens: int = 64, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.probes, self.sample_tokens = list(probes), sample_tokens

    @abstractmethod
    def tokens_a_row(self) -> float:
        """The mean number of tokens that training reads of a row."""

    def on_fresh_start(self) -> None:
        self.write_samples("before")

    def longest_sample(self) -> int:
        """The length of sample answers, by the number of tokens in the run rather than by its speed, so that samples
        are the same on every machine."""
        rows = len(self.train_dataset) * self.args.num_train_epochs
        if self.args.max_steps > 0:
            rows = self.args.max_steps * self.get_total_train_batch_size(self.args)
        affordable = math.ceil(SAMPLED_SHARE * rows * self.tokens_a_row() / (2 * len(self.probes)))
        return min(self.sample_tokens, max(FEWEST_SAMPLE_TOKENS, affordable))

    def write_samples(self, when: str) -> None:
        """Append greedy answers to the probes to samples.jsonl. Only the main process writes; if processes share the
        weights, all of them sample. when: "before" or "after" training."""
        writes = self.is_world_process_zero()
        if not self.probes or not (writes or is_sharded(self.model)):
            return
        tokenizer, ends = self.processing_class, end_tokens(self.model, self.processing_class)
        ids = [render_conversation(p, tokenizer, add_generation_prompt=True)["input_ids"] for p, _ in self.probes]
        with self.accelerator.autocast():
            answers = generate_answers(
                self.model,
                ids,
                pad_token_id=padding_of(tokenizer),
                eos_token_id=ends,
                max_new_tokens=self.longest_sample(),
            )
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        lines = [
            {
                "step": self.state.global_step,
                "when": when,
                "prompt": prompt_text(prompt),
                "completion": answer_text(text),
                "truncated": answer[-1] not in ends,
                "reference": reference,
            }
            for (prompt, reference), text, answer in zip(self.probes, texts, answers, strict=True)
        ]
        if writes:
            append_lines(self.run_dir / SAMPLES_FILE, lines)
