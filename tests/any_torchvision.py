"""torchvision beside a torch that it was not built for: the peers import it, and need none of its operators."""


def import_torchvision():
    """Import it once, before any peer does; where it is not installed nothing happens."""
    import torch

    register_fake = torch.library.register_fake

    def register_all_but_its_own(op, *args, **kwargs):
        """Its Python half describes operators that its wheel may lack."""
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = register_all_but_its_own
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    finally:
        torch.library.register_fake = register_fake
