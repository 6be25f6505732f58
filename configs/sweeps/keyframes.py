"""Table 6: over configs/video_stage3.py."""


def sweep(add):
    """Canvas keyframes; 0 is no canvas."""
    for count in (0, 1, 3, 6, 11, 31):
        add(f"keyframes_{count}", f"keyframes_{count}")
