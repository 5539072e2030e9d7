"""What the tests of models share: captions to learn word pieces from, random pixels, and their embeddings."""
import numpy as np

CAPTIONS = ["Frontal chest radiograph shows a large right pleural effusion.",
            "Axial CT of the head with a small left subdural hematoma.",
            "No pleural effusion or pneumothorax.", "Ultrasound of the kidney with a stone."] * 3
SMALL_TEXT = {"text_width": 32, "text_layers": 2, "text_heads": 2, "context_length": 24}


def pixels(encoder, n=3, seed=0):
    "Random images of the size that the model wants."
    size = encoder.model.visual.preprocess_cfg["size"]
    size = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def embeddings(encoder):
    "Of these images and of the four captions."
    from radclip.model import encode_images, encode_texts
    return encode_images(encoder, pixels(encoder)), encode_texts(encoder, CAPTIONS[:4])
