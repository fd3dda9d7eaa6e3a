def test_the_network_has_learned(digits):
    logits = digits.fn(digits.params, digits.held_out_images)
    assert (logits.argmax(-1) == digits.held_out_labels).mean() > 0.93
