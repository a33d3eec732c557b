"""The plugins, as installed under Volatility's own plugin folder, and the guard in front of their imports."""
