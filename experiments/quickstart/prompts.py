"""Which wording makes the untrained model write the best headlines? `python -m experiments.quickstart.prompts`.

Scores 100 validation articles for each and rewrites `results/prompts.json`, best first.
"""

from pathlib import Path

from configs import quickstart
from lowrank.core import files
from lowrank.training import build

RESULTS = Path(__file__).parent / "results" / "prompts.json"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
ASK = "Write a short news headline for this article."
SIX = "Write a headline of at most six words for this article."


def chat(question: str, answer: str = "", system: str = "") -> str:
    """A prompt in the model's chat format that ends with the start of the `answer`."""
    return f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}"


WORDINGS = {
    "chosen": quickstart.PROMPT,
    "chat": chat(ASK + "\n\n{text}"),
    "chat, system message": chat(ASK + "\n\n{text}", system=SYSTEM),
    "chat, article first": chat("{text}\n\n" + ASK),
    "chat, answer begun": chat(ASK + "\n\n{text}", "Headline:"),
    "chat, article first, answer begun": chat("{text}\n\n" + ASK, "Headline:"),
    "chat, article first, six words, answer begun": chat("{text}\n\n" + SIX, "Headline:"),
    "plain": "{text}\n\nHeadline:",
    "plain, article named": "Article: {text}\nHeadline:",
    "plain, asked": "Read this BBC News article and write its headline in about five words.\n\n{text}\n\nHeadline:",
}


def main() -> None:
    """Scores every wording."""
    base, scores = None, {}
    for name, prompt in WORDINGS.items():
        config = quickstart.get_config()
        config.data.template, config.eval.split = prompt, "validation"
        run = build.build_run(config)
        base = base or run.load()
        scores[name] = {"prompt": prompt, "rougeL": run.scorer.texts(base.params)[0]["rougeL"]}
        print(f"{scores[name]['rougeL']:.3f}  {name}", flush=True)
    files.write_json(RESULTS, dict(sorted(scores.items(), key=lambda item: -item[1]["rougeL"])))


if __name__ == "__main__":
    main()
