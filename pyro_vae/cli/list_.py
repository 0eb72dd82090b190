def list_():
    pass
