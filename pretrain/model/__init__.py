"""The decoder-only mixture-of-experts transformer.

Shape legend, used as suffixes of tensor names everywhere in this project (a lower-case letter is
this rank's part of it):

    B micro batch   S sequence      T = B * S tokens   D hidden         F feed-forward   V
    vocabulary N query heads   M key/value heads                  H head_dim       L layers E
    experts       e = E / ep_size local experts      K top_k          R routed rows (T * K, summed
    over the sources)
"""
