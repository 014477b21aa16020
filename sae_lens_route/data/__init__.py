"""From text to tokens, and from tokens to the residual streams that SAEs read."""
