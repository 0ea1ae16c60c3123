"""Families of image and video models: what the modules of each are called, and how large they are to each other.

A file names modules and does not say which model they are of, and one name stands in several models: FLUX.2 and Chroma
have FLUX.1's ``double_blocks``, Qwen-Image and SD3 its ``transformer_blocks``. So a family is told by both, names and
shapes: in ``FAMILIES`` each module has its inputs and outputs in units of the model's hidden size, which must then be
one number for all of a file. What several families fit is read where they all call the modules alike, and refused
where they do not; what none fits is refused.

A new family is one entry: its modules in diffusers' names, a line each, and the names of the code it was published
with. ``tests/test_families.py`` builds each model and holds the lines against it.
"""

from __future__ import annotations

from moslora.adapters.formats.family import Family

__all__ = ["FAMILIES"]

_JOINT_ATTENTION = """
transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0} 1 1
transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out} 1 1
"""
_TWO_STREAMS = (
    _JOINT_ATTENTION
    + """
transformer_blocks.#.{ff,ff_context}.net.0.proj 1 4
transformer_blocks.#.{ff,ff_context}.net.2 4 1
"""
)
_ONE_STREAM = """
single_transformer_blocks.#.attn.{to_q,to_k,to_v} 1 1
single_transformer_blocks.#.proj_mlp 1 4
single_transformer_blocks.#.proj_out 5 1
"""
_MODULATED = """
transformer_blocks.#.{norm1,norm1_context}.linear 1 6
single_transformer_blocks.#.norm.linear 1 3
time_text_embed.{timestep,guidance,text}_embedder.linear_1 * 1
time_text_embed.{timestep,guidance,text}_embedder.linear_2 1 1
norm_out.linear 1 2
"""
_ENDS = """
{x_embedder,context_embedder} * 1
proj_out 1 *
"""
_CROSS_ATTENTION = """
transformer_blocks.#.{attn1,attn2}.{to_q,to_out.0} 1 1
transformer_blocks.#.attn1.{to_k,to_v} 1 1
transformer_blocks.#.attn2.{to_k,to_v} * 1
"""

# Black Forest Labs' code, and what xlabs' trainer hangs on it.
_BFL_ATTENTION = """
double_blocks.#.img_attn.qkv = transformer_blocks.#.attn.[to_q to_k to_v]
double_blocks.#.txt_attn.qkv = transformer_blocks.#.attn.[add_q_proj add_k_proj add_v_proj]
double_blocks.#.img_attn.proj = transformer_blocks.#.attn.to_out.0
double_blocks.#.txt_attn.proj = transformer_blocks.#.attn.to_add_out
"""
_BFL = (
    _BFL_ATTENTION
    + """
double_blocks.#.{img_mlp,txt_mlp}.0 = transformer_blocks.#.{ff,ff_context}.net.0.proj
double_blocks.#.{img_mlp,txt_mlp}.2 = transformer_blocks.#.{ff,ff_context}.net.2
single_blocks.#.linear1 = single_transformer_blocks.#.[attn.to_q attn.to_k attn.to_v proj_mlp]
single_blocks.#.linear2 = single_transformer_blocks.#.proj_out
{img_in,txt_in} = {x_embedder,context_embedder}
final_layer.linear = proj_out
"""
)
_BFL_MODULATED = """
double_blocks.#.{img_mod,txt_mod}.lin = transformer_blocks.#.{norm1,norm1_context}.linear
single_blocks.#.modulation.lin = single_transformer_blocks.#.norm.linear
{time_in,guidance_in,vector_in}.in_layer = time_text_embed.{timestep,guidance,text}_embedder.linear_1
{time_in,guidance_in,vector_in}.out_layer = time_text_embed.{timestep,guidance,text}_embedder.linear_2
final_layer.adaLN_modulation.1 ~ norm_out.linear
"""
_XLABS = """
double_blocks.#.processor.qkv_lora1 = transformer_blocks.#.attn.[to_q to_k to_v]
double_blocks.#.processor.qkv_lora2 = transformer_blocks.#.attn.[add_q_proj add_k_proj add_v_proj]
double_blocks.#.processor.{proj_lora1,proj_lora2} = transformer_blocks.#.attn.{to_out.0,to_add_out}
single_blocks.#.processor.qkv_lora = single_transformer_blocks.#.attn.[to_q to_k to_v]
single_blocks.#.processor.proj_lora = single_transformer_blocks.#.proj_out
"""
_HUNYUAN_REFINER = "context_embedder.token_refiner.refiner_blocks.#"
_LUMINA_BLOCKS = "{layers,noise_refiner,context_refiner}"


FAMILIES = (
    Family(
        "FLUX.1",
        _TWO_STREAMS + _ONE_STREAM + _MODULATED + _ENDS,
        _BFL + _BFL_MODULATED + _XLABS,
        loader="FluxLoraLoaderMixin",
        encoders=("text_encoder",),
        t5="text_encoder_2",
        in_comfyui=True,
        classes=("FluxTransformer2DModel",),
        native="",
    ),
    Family(
        "FLUX.2",
        _JOINT_ATTENTION
        + """
        transformer_blocks.#.{ff,ff_context}.linear_in 1 6
        transformer_blocks.#.{ff,ff_context}.linear_out 3 1
        single_transformer_blocks.#.attn.to_qkv_mlp_proj 1 9
        single_transformer_blocks.#.attn.to_out 4 1
        time_guidance_embed.{timestep,guidance}_embedder.linear_1 * 1
        time_guidance_embed.{timestep,guidance}_embedder.linear_2 1 1
        double_stream_modulation_{img,txt}.linear 1 6
        single_stream_modulation.linear 1 3
        norm_out.linear 1 2
        """
        + _ENDS,
        # Not final_layer.adaLN_modulation: diffusers 0.42 swaps its halves in the weights and not in LoRA files.
        _BFL_ATTENTION
        + """
        double_blocks.#.{img_mlp,txt_mlp}.0 = transformer_blocks.#.{ff,ff_context}.linear_in
        double_blocks.#.{img_mlp,txt_mlp}.2 = transformer_blocks.#.{ff,ff_context}.linear_out
        single_blocks.#.linear1 = single_transformer_blocks.#.attn.to_qkv_mlp_proj
        single_blocks.#.linear2 = single_transformer_blocks.#.attn.to_out
        {img_in,txt_in} = {x_embedder,context_embedder}
        {time_in,guidance_in}.in_layer = time_guidance_embed.{timestep,guidance}_embedder.linear_1
        {time_in,guidance_in}.out_layer = time_guidance_embed.{timestep,guidance}_embedder.linear_2
        double_stream_modulation_{img,txt}.lin = double_stream_modulation_{img,txt}.linear
        single_stream_modulation.lin = single_stream_modulation.linear
        final_layer.linear = proj_out
        """,
        loader="Flux2LoraLoaderMixin",
        classes=("Flux2Transformer2DModel",),
        native="",
        converted=("original", "kohya"),
    ),
    Family(
        "Chroma",
        _TWO_STREAMS
        + _ONE_STREAM
        + _ENDS
        + """
        distilled_guidance_layer.in_proj * f
        distilled_guidance_layer.layers.#.{linear_1,linear_2} f f
        distilled_guidance_layer.out_proj f 1
        """,
        _BFL
        + "distilled_guidance_layer.layers.#.{in_layer,out_layer} = "
        + "distilled_guidance_layer.layers.#.{linear_1,linear_2}",
        loader="FluxLoraLoaderMixin",
        encoders=("text_encoder",),
        t5="text_encoder",
        classes=("ChromaTransformer2DModel",),
    ),
    Family(
        "Qwen-Image",
        _JOINT_ATTENTION
        + """
        transformer_blocks.#.{img_mlp,txt_mlp}.net.0.proj 1 4
        transformer_blocks.#.{img_mlp,txt_mlp}.net.2 4 1
        transformer_blocks.#.{img_mod,txt_mod}.1 1 6
        time_text_embed.timestep_embedder.linear_1 * 1
        time_text_embed.timestep_embedder.linear_2 1 1
        {img_in,txt_in} * 1
        norm_out.linear 1 2
        proj_out 1 *
        """,
        loader="QwenImageLoraLoaderMixin",
        in_comfyui=True,
        classes=("QwenImageTransformer2DModel",),
        native="*",
        converted=("original", "kohya"),
    ),
    Family(
        "Z-Image",
        f"""
        {_LUMINA_BLOCKS}.#.attention.{{to_q,to_k,to_v,to_out.0}} 1 1
        {_LUMINA_BLOCKS}.#.feed_forward.{{w1,w3}} 1 8/3
        {_LUMINA_BLOCKS}.#.feed_forward.w2 8/3 1
        {{layers,noise_refiner}}.#.adaLN_modulation.0 * 4
        all_x_embedder.2-1 * 1
        all_final_layer.2-1.linear 1 *
        all_final_layer.2-1.adaLN_modulation.1 * 1
        t_embedder.mlp.0 * *
        t_embedder.mlp.2 * *
        cap_embedder.1 * 1
        """,
        f"""
        {_LUMINA_BLOCKS}.#.attention.qkv = {_LUMINA_BLOCKS}.#.attention.[to_q to_k to_v]
        {_LUMINA_BLOCKS}.#.attention.out = {_LUMINA_BLOCKS}.#.attention.to_out.0
        x_embedder = all_x_embedder.2-1
        final_layer.linear = all_final_layer.2-1.linear
        final_layer.adaLN_modulation.1 = all_final_layer.2-1.adaLN_modulation.1
        """,
        loader="ZImageLoraLoaderMixin",
        in_comfyui=True,
        classes=("ZImageTransformer2DModel",),
        native=f"""
        {_LUMINA_BLOCKS}.#.feed_forward.{{w1,w2,w3}}
        {{layers,noise_refiner}}.#.adaLN_modulation.0
        t_embedder.mlp.{{0,2}}
        cap_embedder.1
        """,
        is_split=True,
        converted=("original", "kohya"),
    ),
    Family(
        "Lumina 2",
        f"""
        {_LUMINA_BLOCKS}.#.attn.{{to_q,to_out.0}} 1 1
        {_LUMINA_BLOCKS}.#.attn.{{to_k,to_v}} 1 1/3
        {_LUMINA_BLOCKS}.#.feed_forward.{{linear_1,linear_3}} 1 4
        {_LUMINA_BLOCKS}.#.feed_forward.linear_2 4 1
        {{layers,noise_refiner}}.#.norm1.linear * 4
        x_embedder * 1
        time_caption_embed.timestep_embedder.linear_1 * *
        time_caption_embed.timestep_embedder.linear_2 * *
        time_caption_embed.caption_embedder.1 * 1
        norm_out.linear_1 * 1
        norm_out.linear_2 1 *
        """,
        f"""
        {_LUMINA_BLOCKS}.#.attention.qkv = {_LUMINA_BLOCKS}.#.attn.[to_q to_k to_v]
        {_LUMINA_BLOCKS}.#.attention.out = {_LUMINA_BLOCKS}.#.attn.to_out.0
        {_LUMINA_BLOCKS}.#.feed_forward.w1 = {_LUMINA_BLOCKS}.#.feed_forward.linear_1
        {_LUMINA_BLOCKS}.#.feed_forward.w2 = {_LUMINA_BLOCKS}.#.feed_forward.linear_2
        {_LUMINA_BLOCKS}.#.feed_forward.w3 = {_LUMINA_BLOCKS}.#.feed_forward.linear_3
        {{layers,noise_refiner}}.#.adaLN_modulation.1 = {{layers,noise_refiner}}.#.norm1.linear
        """,
        loader="Lumina2LoraLoaderMixin",
        classes=("Lumina2Transformer2DModel",),
        native="x_embedder",
    ),
    Family(
        "SD3",
        _TWO_STREAMS
        + """
        transformer_blocks.#.attn2.{to_q,to_k,to_v,to_out.0} 1 1
        transformer_blocks.#.norm1.linear 1 6|9
        transformer_blocks.#.norm1_context.linear 1 6|2
        time_text_embed.{timestep,text}_embedder.linear_1 * 1
        time_text_embed.{timestep,text}_embedder.linear_2 1 1
        pos_embed.proj * 1
        context_embedder * 1
        norm_out.linear 1 2
        proj_out 1 *
        """,
        """
        joint_blocks.#.x_block.{attn,attn2}.qkv = transformer_blocks.#.{attn,attn2}.[to_q to_k to_v]
        joint_blocks.#.context_block.attn.qkv = transformer_blocks.#.attn.[add_q_proj add_k_proj add_v_proj]
        joint_blocks.#.x_block.{attn,attn2}.proj = transformer_blocks.#.{attn,attn2}.to_out.0
        joint_blocks.#.context_block.attn.proj = transformer_blocks.#.attn.to_add_out
        joint_blocks.#.{x_block,context_block}.mlp.fc1 = transformer_blocks.#.{ff,ff_context}.net.0.proj
        joint_blocks.#.{x_block,context_block}.mlp.fc2 = transformer_blocks.#.{ff,ff_context}.net.2
        joint_blocks.#.x_block.adaLN_modulation.1 = transformer_blocks.#.norm1.linear
        joint_blocks.#.context_block.adaLN_modulation.1 = transformer_blocks.#.norm1_context.linear : 6
        joint_blocks.#.context_block.adaLN_modulation.1 ~ transformer_blocks.#.norm1_context.linear : 2
        {t_embedder,y_embedder}.mlp.0 = time_text_embed.{timestep,text}_embedder.linear_1
        {t_embedder,y_embedder}.mlp.2 = time_text_embed.{timestep,text}_embedder.linear_2
        x_embedder.proj = pos_embed.proj
        final_layer.linear = proj_out
        final_layer.adaLN_modulation.1 ~ norm_out.linear
        """,
        loader="SD3LoraLoaderMixin",
        encoders=("text_encoder", "text_encoder_2"),
        t5="text_encoder_3",
        in_comfyui=True,
        classes=("SD3Transformer2DModel",),
        native="context_embedder",
    ),
    Family(
        "Wan",
        """
        blocks.#.attn1.{to_q,to_k,to_v,to_out.0} 1 1
        blocks.#.attn2.{to_q,to_k,to_v,to_out.0,add_k_proj,add_v_proj} 1 1
        blocks.#.ffn.net.0.proj 1 f
        blocks.#.ffn.net.2 f 1
        patch_embedding * 1
        condition_embedder.{time_embedder,text_embedder}.linear_1 * 1
        condition_embedder.{time_embedder,text_embedder}.linear_2 1 1
        condition_embedder.time_proj 1 6
        condition_embedder.image_embedder.ff.net.0.proj * *
        condition_embedder.image_embedder.ff.net.2 * 1
        proj_out 1 *
        """,
        """
        blocks.#.self_attn.{q,k,v,o} = blocks.#.attn1.{to_q,to_k,to_v,to_out.0}
        blocks.#.cross_attn.{q,k,v,o,k_img,v_img} = blocks.#.attn2.{to_q,to_k,to_v,to_out.0,add_k_proj,add_v_proj}
        blocks.#.ffn.{0,2} = blocks.#.ffn.net.{0.proj,2}
        {time_embedding,text_embedding}.0 = condition_embedder.{time_embedder,text_embedder}.linear_1
        {time_embedding,text_embedding}.2 = condition_embedder.{time_embedder,text_embedder}.linear_2
        time_projection.1 = condition_embedder.time_proj
        img_emb.proj.{1,3} = condition_embedder.image_embedder.ff.net.{0.proj,2}
        head.head = proj_out
        """,
        loader="WanLoraLoaderMixin",
        classes=("WanTransformer3DModel",),
    ),
    Family(
        "HunyuanVideo",
        _TWO_STREAMS
        + _ONE_STREAM
        + _MODULATED
        + f"""
        x_embedder.proj * 1
        context_embedder.proj_in * 1
        {_HUNYUAN_REFINER}.attn.{{to_q,to_k,to_v,to_out.0}} 1 1
        {_HUNYUAN_REFINER}.ff.net.0.proj 1 4
        {_HUNYUAN_REFINER}.ff.net.2 4 1
        {_HUNYUAN_REFINER}.norm_out.linear 1 2
        context_embedder.time_text_embed.{{timestep,text}}_embedder.linear_1 * 1
        context_embedder.time_text_embed.{{timestep,text}}_embedder.linear_2 1 1
        proj_out 1 *
        """,
        _BFL_ATTENTION.replace("img_attn.", "img_attn_").replace("txt_attn.", "txt_attn_")
        + """
        single_blocks.#.linear1 = single_transformer_blocks.#.[attn.to_q attn.to_k attn.to_v proj_mlp]
        double_blocks.#.{img_mlp,txt_mlp}.fc1 = transformer_blocks.#.{ff,ff_context}.net.0.proj
        double_blocks.#.{img_mlp,txt_mlp}.fc2 = transformer_blocks.#.{ff,ff_context}.net.2
        double_blocks.#.{img_mod,txt_mod}.linear = transformer_blocks.#.{norm1,norm1_context}.linear
        single_blocks.#.linear2 = single_transformer_blocks.#.proj_out
        single_blocks.#.modulation.linear = single_transformer_blocks.#.norm.linear
        img_in.proj = x_embedder.proj
        txt_in.input_embedder = context_embedder.proj_in
        txt_in.t_embedder.mlp.{0,2} = context_embedder.time_text_embed.timestep_embedder.{linear_1,linear_2}
        txt_in.c_embedder.{linear_1,linear_2} = context_embedder.time_text_embed.text_embedder.{linear_1,linear_2}
        {time_in,guidance_in}.mlp.0 = time_text_embed.{timestep,guidance}_embedder.linear_1
        {time_in,guidance_in}.mlp.2 = time_text_embed.{timestep,guidance}_embedder.linear_2
        vector_in.{in_layer,out_layer} = time_text_embed.text_embedder.{linear_1,linear_2}
        final_layer.linear = proj_out
        final_layer.adaLN_modulation.1 ~ norm_out.linear
        """
        + f"""
        txt_in.individual_token_refiner.blocks.#.self_attn_qkv = {_HUNYUAN_REFINER}.attn.[to_q to_k to_v]
        txt_in.individual_token_refiner.blocks.#.self_attn_proj = {_HUNYUAN_REFINER}.attn.to_out.0
        txt_in.individual_token_refiner.blocks.#.mlp.fc1 = {_HUNYUAN_REFINER}.ff.net.0.proj
        txt_in.individual_token_refiner.blocks.#.mlp.fc2 = {_HUNYUAN_REFINER}.ff.net.2
        txt_in.individual_token_refiner.blocks.#.adaLN_modulation.1 = {_HUNYUAN_REFINER}.norm_out.linear
        """,
        loader="HunyuanVideoLoraLoaderMixin",
        classes=("HunyuanVideoTransformer3DModel",),
    ),
    Family(
        "AuraFlow",
        _JOINT_ATTENTION.replace("transformer_blocks", "joint_transformer_blocks")
        + """
        joint_transformer_blocks.#.{norm1,norm1_context}.linear 1 6
        joint_transformer_blocks.#.{ff,ff_context}.{linear_1,linear_2} 1 f
        joint_transformer_blocks.#.{ff,ff_context}.out_projection f 1
        single_transformer_blocks.#.norm1.linear 1 6
        single_transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0} 1 1
        single_transformer_blocks.#.ff.{linear_1,linear_2} 1 f
        single_transformer_blocks.#.ff.out_projection f 1
        time_step_proj.linear_1 * 1
        time_step_proj.linear_2 1 1
        pos_embed.proj * 1
        context_embedder * 1
        norm_out.linear 1 2
        proj_out 1 *
        """,
        loader="AuraFlowLoraLoaderMixin",
        classes=("AuraFlowTransformer2DModel",),
    ),
    Family(
        "LTX-Video",
        _CROSS_ATTENTION
        + """
        transformer_blocks.#.ff.net.0.proj 1 4
        transformer_blocks.#.ff.net.2 4 1
        proj_in * 1
        time_embed.emb.timestep_embedder.linear_1 * 1
        time_embed.emb.timestep_embedder.linear_2 1 1
        time_embed.linear 1 6
        caption_projection.linear_1 * 1
        caption_projection.linear_2 1 1
        proj_out 1 *
        """,
        loader="LTXVideoLoraLoaderMixin",
        classes=("LTXVideoTransformer3DModel",),
    ),
    Family(
        "SANA",
        _CROSS_ATTENTION
        + """
        transformer_blocks.#.ff.{conv_inverted,conv_depth,conv_point} * *
        patch_embed.proj * 1
        time_embed.emb.timestep_embedder.linear_1 * 1
        time_embed.emb.timestep_embedder.linear_2 1 1
        time_embed.linear 1 6
        caption_projection.linear_1 * 1
        caption_projection.linear_2 1 1
        proj_out 1 *
        """,
        loader="SanaLoraLoaderMixin",
        classes=("SanaTransformer2DModel",),
    ),
    Family(
        "PixArt",
        _CROSS_ATTENTION
        + """
        transformer_blocks.#.ff.net.0.proj 1 4
        transformer_blocks.#.ff.net.2 4 1
        pos_embed.proj * 1
        adaln_single.emb.timestep_embedder.linear_1 * 1
        adaln_single.emb.timestep_embedder.linear_2 1 1
        adaln_single.emb.{resolution,aspect_ratio}_embedder.{linear_1,linear_2} * *
        adaln_single.linear 1 6
        caption_projection.linear_1 * 1
        caption_projection.linear_2 1 1
        proj_out 1 *
        """,
        classes=("PixArtTransformer2DModel",),
    ),
)
