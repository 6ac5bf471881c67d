"""A Space that shows FlexiCodec. The variables MODEL and WHISPER (README.md) name repositories of the Hub."""

import os
from pathlib import Path

from flexicodec_hf.cli import main


if __name__ == "__main__":
    clips = Path(__file__).parent / "clips"
    command = ["app", "--model", os.environ["MODEL"], "--clips", str(clips), "--host", "0.0.0.0", "--port", "7860"]
    if whisper := os.environ.get("WHISPER"):
        command += ["--whisper", whisper]
    main(command)
