"""How text degenerates under each way of decoding, beside the text that people wrote.

    python benchmarks/degeneration.py RUN TEXT [--prompts 100] [--prompt_tokens 16] [--new_tokens 48]

TEXT is what the run was trained on; prompts are taken from its last tenth, the validation split. `repeated` is the
share of new pieces of NGRAM tokens that stand earlier in the same text, the prompt included; `log-prob` is the mean of
what the model gives each new token (without any parameter), in nats.
"""

import argparse
from pathlib import Path

import torch

import minillm
from minillm.generate.params import SamplingParams

DECODINGS = {
    "greedy": {"temperature": 0},
    "beam search, 4": {"use_beam_search": True, "num_beams": 4},
    "greedy, repetition_penalty 1.2": {"temperature": 0, "repetition_penalty": 1.2},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 0.8": {"temperature": 0.8},
    "top_k 10": {"top_k": 10},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.1": {"min_p": 0.1},
    "temperature 1": {},
    "temperature 1.5": {"temperature": 1.5},
}


def repeated(text: list[int], first: int, n: int) -> float:
    """The share of n-grams that end at or after `first` and stand earlier in the text."""
    grams = [tuple(text[end - n : end]) for end in range(n, len(text) + 1)]
    new = range(max(first - n + 1, 0), len(grams))
    return sum(grams[i] in grams[:i] for i in new) / len(new)


@torch.no_grad()
def mean_log_prob(model: torch.nn.Module, text: list[int], first: int) -> float:
    """What the model gives the tokens from `first` on, each on average."""
    tokens = torch.tensor([text])
    log_probs = model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])  # (1, T - 1, 1)
    return log_probs[0, first - 1 :].mean().item()


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--ngram", type=int, default=8)
    options = parser.parse_args(arguments)
    model, tokenizer = minillm.load(options.run)
    first, length = options.prompt_tokens, options.prompt_tokens + options.new_tokens
    text = options.text.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text[len(text) * 9 // 10 :])
    starts = torch.linspace(0, len(tokens) - length, options.prompts).long().tolist()
    human = [tokens[start : start + length] for start in starts]

    print("| decoding | repeated | log-prob | a completion |\n|---|---|---|---|")
    for name, fields in {"people": None, **DECODINGS}.items():
        texts = human
        if fields is not None:
            common = {"max_new_tokens": options.new_tokens, "ignore_eos": True}
            params = [SamplingParams(**common, **fields, seed=number) for number in range(len(human))]
            prompts = [text[:first] for text in human]
            found = minillm.generate(model, tokenizer, prompts, params)
            texts = [prompt + completion.tokens for prompt, completion in zip(prompts, found)]
        share = sum(repeated(text, first, options.ngram) for text in texts) / len(texts)
        log_prob = sum(mean_log_prob(model, text, first) for text in texts) / len(texts)
        shown = tokenizer.decode(texts[1][first:]).replace("\n", " / ").replace("|", "")
        print(f"| {name} | {100 * share:.1f}% | {log_prob:.2f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
