"""What every backend implements: the operations' signatures, on plain tensors and integers."""

# geometry = [height, width, h, w, wrap_y, wrap_x, tile_y, tile_x]; origins, cover_start and cover_index are the int32
# tables of a WindowPlan; coefficients = [a, b, c_1 .. c_k], keep = [d, e] and carry = [p, q] are float64, history is
# (k, B, C, H, W), latest one canvas for each guidance branch, or of none where nothing is kept.
SCHEMAS = {
    "gather_windows": "(Tensor canvas, Tensor origins, Tensor cover_start, Tensor cover_index, "
    "SymInt[] geometry) -> Tensor",
    "scatter_windows": "(Tensor windows, Tensor? weight, Tensor origins, Tensor cover_start, Tensor cover_index, "
    "SymInt[] geometry, bool normalize) -> Tensor",
    "guided_step": "(Tensor cond, Tensor? uncond, Tensor sample, Tensor? weight, Tensor history, Tensor latest, "
    "Tensor coefficients, Tensor keep, Tensor carry, float guidance_scale, Tensor? guidance_map, Tensor origins, "
    "Tensor cover_start, Tensor cover_index, SymInt[] geometry) -> (Tensor, Tensor, Tensor)",
    "regional_attention": "(Tensor query, Tensor key, Tensor value, Tensor prompt_ids, Tensor weights, bool joint, "
    "float scale, Tensor? order=None, Tensor? lengths=None) -> Tensor",
    "regional_attention_backward": "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor prompt_ids, "
    "Tensor weights, bool joint, float scale, Tensor? order=None, Tensor? lengths=None) -> (Tensor, Tensor, Tensor)",
}
