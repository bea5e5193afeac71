"""Train the demo checkpoint from nothing: `python -m distri.models.demo.train --out DIR`.

Stages run in order and each resumes where it was: `vae`, `text`, `unet`, `decoder` (the encoder is fixed once the
denoiser has seen it; the decoder may still improve), `export`. Every length is wall clock.
"""

import argparse
from pathlib import Path

import torch

STAGES = ("vae", "text", "unet", "decoder", "export")


def main(arguments: list[str] | None = None) -> None:
    """Run the stages named by the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the training state and of the export"
    )
    parser.add_argument(
        "--stage", choices=STAGES, action="append", help="run this stage only (may be repeated)"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="begin the denoiser and the decoder with those of this checkpoint, and leave the rest as it is there",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vae-minutes", type=float, default=12.0)
    parser.add_argument("--text-minutes", type=float, default=8.0)
    parser.add_argument("--unet-minutes", type=float, default=168.0)
    parser.add_argument("--decoder-minutes", type=float, default=8.0)
    parser.add_argument("--export", type=Path, help="folder of the checkpoint (default: OUT/checkpoint)")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.source is not None:
        from distri.models.demo.export import take_apart

        take_apart(flags.source, flags.out)
    for stage in flags.stage or (STAGES if flags.source is None else STAGES[2:]):
        if stage == "vae":
            from distri.models.demo.vae import train_vae

            train_vae(flags.out, flags.vae_minutes * 60)
        elif stage == "text":
            from distri.models.demo.text import train_text

            train_text(flags.out, flags.text_minutes * 60)
        elif stage == "unet":
            from distri.models.demo.unet import train_unet_by_peers

            train_unet_by_peers(flags.out, flags.unet_minutes * 60, flags.threads)
        elif stage == "decoder":
            from distri.models.demo.vae import train_decoder

            train_decoder(flags.out, flags.decoder_minutes * 60)
        else:
            from distri.models.demo.export import export

            export(flags.out, flags.export or flags.out / "checkpoint")


if __name__ == "__main__":
    main()
