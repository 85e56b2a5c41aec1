"""Continue openings, greedily and by sampling, and print them as Markdown.

python sample.py CHECKPOINT TOKENIZER [OPENING ...]
"""

import sys
from pathlib import Path

import torch
from model import GPT2, Config
from tokenizers import Tokenizer

OPENINGS = [
    "Once upon a time",
    "Once upon a time there was a little girl named Lily.",
    "The little girl",
    "The little dog wanted",
    "One day, a boy named Tim found",
    "There was once a king who",
    "The cat and the mouse",
    "It was a cold day and the snow",
    "Mom said,",
    "The old man lived in a small house near the sea.",
    "A bird sat in the big tree.",
    "Tom and Sue were playing in the park.",
]


def load(checkpoint: Path) -> GPT2:
    """The trained model, its weights rounded to 7 significant bits, as they are exported.

    bfloat16 has room for 8; one bit less costs 0.0001 in the loss and saves 0.4 MB of the compressed file.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = GPT2(Config(**state["config"]))
    model.load_state_dict(state["model"])
    for parameter in model.parameters():
        mantissa, exponent = torch.frexp(parameter.data)
        parameter.data = torch.ldexp(torch.round(mantissa * 2**7) / 2**7, exponent)
    return model.eval()


@torch.no_grad()
def continued(model: GPT2, ids: list[int], length: int, temperature: float, stop: int | None = None) -> list[int]:
    """ids and what follows, up to `length` tokens in all or to the token `stop`; temperature 0: the likeliest ones."""
    generator = torch.Generator().manual_seed(0)
    ids = list(ids)
    while len(ids) < length:
        logits = model.logits(model(torch.tensor([ids]))[0][0, -1])  # (V,)
        if temperature:
            following = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator).item()
        else:
            following = logits.argmax().item()
        if following == stop:
            break
        ids.append(int(following))
    return ids


def main() -> None:
    model, tokenizer = load(Path(sys.argv[1])), Tokenizer.from_file(sys.argv[2])
    for opening in sys.argv[3:] or OPENINGS:
        ids = tokenizer.encode(opening).ids
        print(f"**{opening}**\n")
        for name, temperature in (("greedy", 0.0), ("sampled at 0.7", 0.7)):
            text = tokenizer.decode(continued(model, ids, len(ids) + 120, temperature, stop=0))
            print(f"- {name}: {' / '.join(text.splitlines())}")
        print(flush=True)


if __name__ == "__main__":
    main()
