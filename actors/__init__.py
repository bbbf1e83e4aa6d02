"""Everything that needs Ray or an engine process: one actor or one worker loop per file."""

import os

# Ray reads this when it is first imported. A local instance then listens on loopback alone, as Ray
# does by itself on desktop systems; with an address, the cluster's own settings are in force.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
