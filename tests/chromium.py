"""A page in headless Chromium: its text after a script has run in it, and pictures of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
    "--allow-file-access-from-files --virtual-time-budget=6000"
).split()
_COLLECT = """
<script>
window.trouble = [];
window.addEventListener("error", (event) => window.trouble.push(String(event.message)));
document.addEventListener("securitypolicyviolation", (event) => window.trouble.push(event.violatedDirective));
</script>
"""
_ASK = """
<script>
window.addEventListener("load", () => setTimeout(() => {{
  let found;
  try {{ found = (() => {{ {script} }})(); }} catch (error) {{ window.trouble.push(String(error)); }}
  parent.postMessage(JSON.stringify({{found, trouble: window.trouble}}), "*");
}}, 100));
</script>
"""
_OUTER = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0; }} iframe {{ border: 0; }}</style>
<iframe src="inner.html" width="{width}" height="{height}"></iframe><pre id="answer"></pre>
<script>addEventListener("message", (event) => document.getElementById("answer").textContent = event.data);</script>
"""


class Browser:
    """Opens one page, in a frame of any width."""

    def __init__(self, page: str, folder: Path) -> None:
        self._page = page
        self._folder = folder

    def ask(self, script: str, width: int = 1280, height: int = 900, dark: bool = False) -> Any:
        """What a script returns, run once the page is there; raises AssertionError for any error in the page."""
        self._lay_out(script, width, height)
        said = self._run(["--dump-dom"], width, height, dark)
        match = re.search(r'<pre id="answer">(.*?)</pre>', said, re.DOTALL)
        assert match is not None, "the page has no place for an answer"
        assert match[1], "the page did not answer"
        answer = json.loads(unescape(match[1]))
        assert answer["trouble"] == []
        return answer.get("found")

    def shoot(
        self, path: Path, script: str = "", width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        """A picture."""
        self._lay_out(script, width, height)
        self._run([f"--screenshot={path}"], width, height, dark)

    def _lay_out(self, script: str, width: int, height: int) -> None:
        page = self._page.replace("<head>", f"<head>{_COLLECT}", 1)
        page = page.replace("</body>", _ASK.format(script=script) + "</body>")
        (self._folder / "inner.html").write_text(page, encoding="utf-8")
        (self._folder / "outer.html").write_text(_OUTER.format(width=width, height=height), encoding="utf-8")

    def _run(self, flags: list[str], width: int, height: int, dark: bool) -> str:
        assert PROGRAM is not None
        profile = self._folder / "chromium"
        shutil.rmtree(profile, ignore_errors=True)
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        command = [
            PROGRAM,
            *FLAGS,
            *scheme,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            *flags,
        ]
        command.append((self._folder / "outer.html").as_uri())
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
