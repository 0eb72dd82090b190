def manifold():
    pass
