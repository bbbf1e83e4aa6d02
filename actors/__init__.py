"""All code that needs Ray or an engine process: one actor or one worker loop per file."""

import os

# Ray reads this when it is first imported. A local instance then listens on loopback only, as Ray
# does by default on desktop systems. With an address, the cluster's own settings apply.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
