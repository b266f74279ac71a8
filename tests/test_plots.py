from nano_db.plots import draw_idea


def test_the_picture_of_the_idea_is_drawn(tmp_path):
    draw_idea(tmp_path / "idea.png", blocks=3)
    assert (tmp_path / "idea.png").read_bytes().startswith(b"\x89PNG")
