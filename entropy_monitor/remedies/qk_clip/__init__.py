"""QK-clip (Kimi K2): which logits are too large, where the weights behind them lie, and scaling them."""
