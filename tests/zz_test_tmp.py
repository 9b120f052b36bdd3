import minidiffusion.cli.train
def test_a(): pass
