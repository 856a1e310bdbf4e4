"""RFD4 Proteina (protein structures), which diffusers gives a LoRA loader too."""

from .family import Family
from .rules import Names

RFD4_PROTEINA = Family(
    name="rfd4-proteina",
    components={
        "transformer": Names(
            same="""
init_repr_factory.feature_modules.token_type ; init_repr_factory.feature_modules.secondary_structure
init_repr_factory.feature_modules.atom_charge ; init_repr_factory.feature_modules.atomic_element
init_repr_factory.linear_out ; cond_factory.feature_modules.cath_code.c
cond_factory.feature_modules.cath_code.a ; cond_factory.feature_modules.cath_code.t ; cond_factory.linear_out
transition_c_1.swish_linear.0 ; transition_c_1.linear_out ; transition_c_2.swish_linear.0
transition_c_2.linear_out ; pair_repr_builder.init_repr_factory.ln_out
pair_repr_builder.init_repr_factory.linear_out ; pair_repr_builder.cond_factory.ln_out
pair_repr_builder.cond_factory.linear_out ; pair_repr_builder.adaln.norm_cond
pair_repr_builder.adaln.to_gamma.0 ; pair_repr_builder.adaln.to_beta ; pair_update_layers.0.layer_norm_in
pair_update_layers.0.linear_x ; pair_update_layers.0.tri_mult_out.linear_a_p
pair_update_layers.0.tri_mult_out.linear_a_g ; pair_update_layers.0.tri_mult_out.linear_b_p
pair_update_layers.0.tri_mult_out.linear_b_g ; pair_update_layers.0.tri_mult_out.linear_g
pair_update_layers.0.tri_mult_out.linear_z ; pair_update_layers.0.tri_mult_out.layer_norm_in
pair_update_layers.0.tri_mult_out.layer_norm_out ; pair_update_layers.0.tri_mult_in.linear_a_p
pair_update_layers.0.tri_mult_in.linear_a_g ; pair_update_layers.0.tri_mult_in.linear_b_p
pair_update_layers.0.tri_mult_in.linear_b_g ; pair_update_layers.0.tri_mult_in.linear_g
pair_update_layers.0.tri_mult_in.linear_z ; pair_update_layers.0.tri_mult_in.layer_norm_in
pair_update_layers.0.tri_mult_in.layer_norm_out ; pair_update_layers.0.transition_out.layer_norm
pair_update_layers.0.transition_out.linear_1 ; pair_update_layers.0.transition_out.linear_2
pair_update_layers.2.layer_norm_in ; pair_update_layers.2.linear_x
pair_update_layers.2.tri_mult_out.linear_a_p ; pair_update_layers.2.tri_mult_out.linear_a_g
pair_update_layers.2.tri_mult_out.linear_b_p ; pair_update_layers.2.tri_mult_out.linear_b_g
pair_update_layers.2.tri_mult_out.linear_g ; pair_update_layers.2.tri_mult_out.linear_z
pair_update_layers.2.tri_mult_out.layer_norm_in ; pair_update_layers.2.tri_mult_out.layer_norm_out
pair_update_layers.2.tri_mult_in.linear_a_p ; pair_update_layers.2.tri_mult_in.linear_a_g
pair_update_layers.2.tri_mult_in.linear_b_p ; pair_update_layers.2.tri_mult_in.linear_b_g
pair_update_layers.2.tri_mult_in.linear_g ; pair_update_layers.2.tri_mult_in.linear_z
pair_update_layers.2.tri_mult_in.layer_norm_in ; pair_update_layers.2.tri_mult_in.layer_norm_out
pair_update_layers.2.transition_out.layer_norm ; pair_update_layers.2.transition_out.linear_1
pair_update_layers.2.transition_out.linear_2 ; pair_update_layers.4.layer_norm_in
pair_update_layers.4.linear_x ; pair_update_layers.4.tri_mult_out.linear_a_p
pair_update_layers.4.tri_mult_out.linear_a_g ; pair_update_layers.4.tri_mult_out.linear_b_p
pair_update_layers.4.tri_mult_out.linear_b_g ; pair_update_layers.4.tri_mult_out.linear_g
pair_update_layers.4.tri_mult_out.linear_z ; pair_update_layers.4.tri_mult_out.layer_norm_in
pair_update_layers.4.tri_mult_out.layer_norm_out ; pair_update_layers.4.tri_mult_in.linear_a_p
pair_update_layers.4.tri_mult_in.linear_a_g ; pair_update_layers.4.tri_mult_in.linear_b_p
pair_update_layers.4.tri_mult_in.linear_b_g ; pair_update_layers.4.tri_mult_in.linear_g
pair_update_layers.4.tri_mult_in.linear_z ; pair_update_layers.4.tri_mult_in.layer_norm_in
pair_update_layers.4.tri_mult_in.layer_norm_out ; pair_update_layers.4.transition_out.layer_norm
pair_update_layers.4.transition_out.linear_1 ; pair_update_layers.4.transition_out.linear_2
pair_update_layers.6.layer_norm_in ; pair_update_layers.6.linear_x
pair_update_layers.6.tri_mult_out.linear_a_p ; pair_update_layers.6.tri_mult_out.linear_a_g
pair_update_layers.6.tri_mult_out.linear_b_p ; pair_update_layers.6.tri_mult_out.linear_b_g
pair_update_layers.6.tri_mult_out.linear_g ; pair_update_layers.6.tri_mult_out.linear_z
pair_update_layers.6.tri_mult_out.layer_norm_in ; pair_update_layers.6.tri_mult_out.layer_norm_out
pair_update_layers.6.tri_mult_in.linear_a_p ; pair_update_layers.6.tri_mult_in.linear_a_g
pair_update_layers.6.tri_mult_in.linear_b_p ; pair_update_layers.6.tri_mult_in.linear_b_g
pair_update_layers.6.tri_mult_in.linear_g ; pair_update_layers.6.tri_mult_in.linear_z
pair_update_layers.6.tri_mult_in.layer_norm_in ; pair_update_layers.6.tri_mult_in.layer_norm_out
pair_update_layers.6.transition_out.layer_norm ; pair_update_layers.6.transition_out.linear_1
pair_update_layers.6.transition_out.linear_2 ; pair_update_layers.8.layer_norm_in
pair_update_layers.8.linear_x ; pair_update_layers.8.tri_mult_out.linear_a_p
pair_update_layers.8.tri_mult_out.linear_a_g ; pair_update_layers.8.tri_mult_out.linear_b_p
pair_update_layers.8.tri_mult_out.linear_b_g ; pair_update_layers.8.tri_mult_out.linear_g
pair_update_layers.8.tri_mult_out.linear_z ; pair_update_layers.8.tri_mult_out.layer_norm_in
pair_update_layers.8.tri_mult_out.layer_norm_out ; pair_update_layers.8.tri_mult_in.linear_a_p
pair_update_layers.8.tri_mult_in.linear_a_g ; pair_update_layers.8.tri_mult_in.linear_b_p
pair_update_layers.8.tri_mult_in.linear_b_g ; pair_update_layers.8.tri_mult_in.linear_g
pair_update_layers.8.tri_mult_in.linear_z ; pair_update_layers.8.tri_mult_in.layer_norm_in
pair_update_layers.8.tri_mult_in.layer_norm_out ; pair_update_layers.8.transition_out.layer_norm
pair_update_layers.8.transition_out.linear_1 ; pair_update_layers.8.transition_out.linear_2
pair_update_layers.10.layer_norm_in ; pair_update_layers.10.linear_x
pair_update_layers.10.tri_mult_out.linear_a_p ; pair_update_layers.10.tri_mult_out.linear_a_g
pair_update_layers.10.tri_mult_out.linear_b_p ; pair_update_layers.10.tri_mult_out.linear_b_g
pair_update_layers.10.tri_mult_out.linear_g ; pair_update_layers.10.tri_mult_out.linear_z
pair_update_layers.10.tri_mult_out.layer_norm_in ; pair_update_layers.10.tri_mult_out.layer_norm_out
pair_update_layers.10.tri_mult_in.linear_a_p ; pair_update_layers.10.tri_mult_in.linear_a_g
pair_update_layers.10.tri_mult_in.linear_b_p ; pair_update_layers.10.tri_mult_in.linear_b_g
pair_update_layers.10.tri_mult_in.linear_g ; pair_update_layers.10.tri_mult_in.linear_z
pair_update_layers.10.tri_mult_in.layer_norm_in ; pair_update_layers.10.tri_mult_in.layer_norm_out
pair_update_layers.10.transition_out.layer_norm ; pair_update_layers.10.transition_out.linear_1
pair_update_layers.10.transition_out.linear_2 ; pair_update_layers.12.layer_norm_in
pair_update_layers.12.linear_x ; pair_update_layers.12.tri_mult_out.linear_a_p
pair_update_layers.12.tri_mult_out.linear_a_g ; pair_update_layers.12.tri_mult_out.linear_b_p
pair_update_layers.12.tri_mult_out.linear_b_g ; pair_update_layers.12.tri_mult_out.linear_g
pair_update_layers.12.tri_mult_out.linear_z ; pair_update_layers.12.tri_mult_out.layer_norm_in
pair_update_layers.12.tri_mult_out.layer_norm_out ; pair_update_layers.12.tri_mult_in.linear_a_p
pair_update_layers.12.tri_mult_in.linear_a_g ; pair_update_layers.12.tri_mult_in.linear_b_p
pair_update_layers.12.tri_mult_in.linear_b_g ; pair_update_layers.12.tri_mult_in.linear_g
pair_update_layers.12.tri_mult_in.linear_z ; pair_update_layers.12.tri_mult_in.layer_norm_in
pair_update_layers.12.tri_mult_in.layer_norm_out ; pair_update_layers.12.transition_out.layer_norm
pair_update_layers.12.transition_out.linear_1 ; pair_update_layers.12.transition_out.linear_2 ; s_cycle_norm
s_cycle_proj ; z_cycle_norm ; z_cycle_proj ; local_latents_linear.0 ; local_latents_linear.1 ; ca_linear.0
ca_linear.1 ; sequence_readout.0 ; sequence_readout.1 ; insertion_q_proj ; insertion_k_proj
[transformer_layers.{i}]
  mhba.adaln.norm_cond ; mhba.adaln.to_gamma.0 ; mhba.adaln.to_beta ; mhba.mha.node_norm ; mhba.mha.to_q
  mhba.mha.to_k ; mhba.mha.to_v ; mhba.mha.to_g ; mhba.mha.norm_q ; mhba.mha.norm_k ; mhba.mha.to_out
  mhba.mha.to_bias ; mhba.mha.pair_norm ; mhba.scale_output.0 ; transition.adaln.norm_cond
  transition.adaln.to_gamma.0 ; transition.adaln.to_beta ; transition.transition.swish_linear.0
  transition.transition.linear_out ; transition.scale_output.0
"""
        )
    },
    model_classes=("RFD4ProteinaTransformer",),
)
