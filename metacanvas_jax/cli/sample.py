"""``metacanvas sample``."""

import argparse
from pathlib import Path

EXAMPLE = 'metacanvas sample --run runs/demo --prompt "two red cats left of a blue car"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--out", type=Path, help="PNG to write (RUN/samples/PROMPT.png)")
    parser.add_argument("--count", type=int, default=4, help="pictures to draw, side by side (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default: 0)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the config's)")


def run(arguments: argparse.Namespace) -> None:
    """Draws one prompt several times."""
    from metacanvas_jax import runs
    from metacanvas_jax.errors import UserError
    from metacanvas_jax.eval import pictures

    for name in ("count", "steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    trained = runs.load(arguments.run)
    drawn = trained.draw(
        [arguments.prompt] * arguments.count, seed=arguments.seed, steps=arguments.steps, guidance=arguments.guidance
    )
    words = "_".join("".join(c if c.isalnum() else " " for c in arguments.prompt).split())[:80] or "empty"
    out = arguments.out or arguments.run / "samples" / f"{words}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_png(pictures.grid(list(drawn.pixels), columns=arguments.count), out)
    print(out)
