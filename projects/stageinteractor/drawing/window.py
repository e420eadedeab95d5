"""A window that shows pictures, opened by matplotlib."""

import os
import sys

import matplotlib
import numpy as np

from ..errors import UserError

QUIT = ("q", "escape")
WAIT, GLANCE = 0.05, 0.001  # seconds for the window between two looks at its keys


class WindowClosed(Exception):
    """Somebody has closed the window, or pressed q or Esc in it."""


def has_display() -> bool:
    return os.name == "nt" or sys.platform == "darwin" or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


class Window:
    """Shows one picture after the other.

    Raises:
        UserError: no window can be opened here.
    """

    def __init__(self):
        matplotlib.rcParams["toolbar"] = "None"
        try:
            import matplotlib.pyplot as plt  # loads what windows need, so never without --window

            self.figure = plt.figure()
        except Exception as error:  # toolkits without a display raise all sorts
            raise UserError(f"cannot open a window ({error}): leave out --window") from error
        canvas = self.figure.canvas
        if canvas.required_interactive_framework is None:
            cure = "install PySide6 or leave out --window" if has_display() else (
                "there is no display, leave out --window"
            )
            raise UserError(f"matplotlib cannot open a window here: {cure}")
        canvas.mpl_disconnect(canvas.manager.key_press_handler_id)  # or s would save, l rescale
        canvas.mpl_connect("key_press_event", lambda event: self.note(event.key or "unknown"))
        canvas.mpl_connect("close_event", lambda event: self.note(QUIT[0]))
        self.canvas, self.key = canvas, ""
        self.canvas.manager.show()

    def note(self, key: str):
        self.key = key

    def show(self, picture: np.ndarray, title: str, *, wait: bool):
        """Show a picture (H, W, 3), RGB, uint8.

        Args:
            title: of the window.
            wait: until a key is pressed.

        Raises:
            WindowClosed: see there.
        """
        self.figure.clear()
        axes = self.figure.add_axes((0, 0, 1, 1))
        axes.imshow(picture)
        axes.axis("off")
        self.canvas.manager.set_window_title(title)
        self.canvas.draw_idle()
        self.canvas.start_event_loop(WAIT if wait else GLANCE)
        while wait and not self.key:
            self.canvas.start_event_loop(WAIT)
        key, self.key = self.key, ""
        if key in QUIT:
            raise WindowClosed
