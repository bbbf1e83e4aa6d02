"""Everything that needs Ray or an engine process: one actor or one worker loop per file."""
