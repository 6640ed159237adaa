"""The decoder-only mixture-of-experts transformer.

Tensor names end in their shape, everywhere in this project: ``x_BSD`` is [B, S, D]. A lower-case
letter is this rank's part of the dimension.

    B  micro batch      S  sequence            T  B * S tokens
    D  hidden           F  feed-forward        V  vocabulary
    N  query heads      M  key/value heads     H  head_dim
    L  layers           E  experts             e  E / ep_size local experts
    K  top_k            R  routed rows: T * K, summed over the ranks that sent them
"""
