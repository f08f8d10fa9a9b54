"""The model types that the table lacks, and why."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "a part of a type in the table": """
        aimv2_text_model altclip_text_model altclip_vision_model blip_2_qformer
        blip_2_vision_model blip_text_model blip_vision_model chinese_clip_text_model
        chinese_clip_vision_model clip_text_model git_vision_model got_ocr2_vision
        idefics2_perceiver idefics2_vision idefics3_vision instructblip_qformer
        instructblip_vision_model internvl_vision lasr_encoder metaclip_2_text_model
        metaclip_2_vision_model parakeet_encoder pixtral qwen2_5_vl_text qwen2_5_vl_vision
        qwen2_vl_text qwen2_vl_vision qwen3_vl_moe_text qwen3_vl_moe_vision qwen3_vl_text
        qwen3_vl_vision siglip2_text_model siglip_text_model smolvlm_vision
        mistral_large4_text glm4v_moe_text glm4v_moe_vision glm4v_text glm4v_vision glm_ocr_text glm_ocr_vision
        qwen3_5_moe_vision qwen3_5_vision t5_gemma_module t5gemma2_decoder t5gemma2_encoder t5gemma2_text
    """,
    "its model class is that of a type in the table": """
        gpt-sw3 internlm3 iquestcoder mlcd nougat pp_chart2table
    """,
    "its decoder of text is in the table": """
        cohere_compass dots3_note emu3 gemma3n gemma4_unified inkling2
        inkling_mm_model lfm2_vl lfm3_vl minimax_m3_vl musicgen
        nemotron_h_omni qwen4_exp shieldgemma2
    """,
    "a part of a type that is not in the table": """
        align_text_model align_vision_model audioflamingo3_encoder blt_global_transformer
        blt_local_decoder blt_local_encoder blt_patcher bridgetower_text_model
        bridgetower_vision_model canary_decoder chameleon_vqgan clap_audio_model
        clap_text_model clipseg_text_model clipseg_vision_model clvp_decoder clvp_encoder
        cohere_compass_vision cosmos3_edge_text cosmos3_edge_vision
        csm_depth_decoder_model deepseek_ocr2_encoder deepseek_ocr2_sam_vision_model
        deepseek_ocr2_text deepseek_ocr2_vision dia_decoder dia_encoder
        diffusion_gemma_text dots3_note_audio_encoder dots3_note_vision_encoder
        edgetam_mask_decoder edgetam_prompt_encoder edgetam_video_mask_decoder
        edgetam_video_prompt_encoder edgetam_vision_model embedding_gemma2_text emu3_vqgan
        ernie4_5_vl_moe_text ernie4_5_vl_moe_vision exaone4_5_vision flava_image_codebook
        flava_image_model flava_multimodal_model flava_text_model fun_asr_nano_encoder
        gemma3n_audio gemma4_audio gemma4_unified_audio gemma4_unified_vision
        gemma4_vision
        glm5_next_text glm5_next_vision glm_image_text glm_image_vision glm_image_vqmodel
        glmasr_encoder granite4_vision_text
        granite_docling_text granite_docling_vision granite_speech5_encoder
        granite_speech_encoder granite_speech_plus_encoder groupvit_text_model
        groupvit_vision_model hunyuan_vl_text hunyuan_vl_vision idefics_perciever
        idefics_vision inkling2_vision inkling_audio inkling_vision
        instructblipvideo_qformer instructblipvideo_vision_model janus_vision_model
        janus_vqgan kimi_k25_vision kosmos_2_5_text_model kosmos_2_5_vision_model
        kosmos_2_text_model kosmos_2_vision_model lfm3_vl_vision llama4_vision_model
        lw_detr_vit maskformer-swin minicpm_ocr_vision minicpmv4_6_vision
        minicpmv4_7_vision minimax_m3_vl_vision mllama_vision_model
        molmo2_adapter molmo2_text molmo2_vision moonshine_streaming_encoder moshi_depth
        moss_transcribe_diarize_audio muse_glimmer_text muse_glimmer_vision
        muse_spark_audio muse_spark_text muse_spark_vision musicgen_melody_decoder
        nemotron3_5_transcribe_asr_audio nemotron3_5_transcribe_audio
        nemotron3_diarization_audio nemotron_asr_streaming_encoder ovis2_vision
        owlv2_text_model owlv2_vision_model owlvit_text_model owlvit_vision_model
        paddleocr_vl_text paddleocr_vl_vision pe_audio_encoder pe_audio_video_encoder
        pe_video_encoder phi4_multimodal_audio phi4_multimodal_vision
        pix2struct_text_model pix2struct_vision_model pocket_tts_audio_tokenizer_decoder
        pocket_tts_audio_tokenizer_encoder pp_chart2table_vision pp_formulanet_text
        pp_formulanet_vision qianfan_ocr_vision qwen2_5_omni_audio_encoder
        qwen2_5_omni_bigvgan qwen2_5_omni_dit qwen2_5_omni_talker qwen2_5_omni_text
        qwen2_5_omni_thinker qwen2_5_omni_token2wav qwen2_5_omni_vision_encoder
        qwen2_audio_encoder qwen3_asr_encoder
        qwen3_omni_moe_audio_encoder qwen3_omni_moe_talker_code_predictor
        qwen3_omni_moe_talker_text qwen3_omni_moe_text qwen3_omni_moe_thinker
        qwen3_omni_moe_vision_encoder qwen4_exp_vision rf_detr_dinov2 sam2_hiera_det_model
        sam2_mask_decoder sam2_prompt_encoder sam2_video_mask_decoder
        sam2_video_prompt_encoder sam2_vision_model sam3_detr_decoder sam3_detr_encoder
        sam3_geometry_encoder sam3_lite_text_detr_decoder sam3_lite_text_detr_encoder
        sam3_lite_text_geometry_encoder sam3_lite_text_mask_decoder
        sam3_lite_text_text_model sam3_mask_decoder sam3_tracker_mask_decoder
        sam3_tracker_prompt_encoder sam3_tracker_video_mask_decoder
        sam3_tracker_video_prompt_encoder sam3_vision_model sam3_vit_model
        sam_hq_mask_decoder sam_hq_prompt_encoder sam_hq_vision_model sam_mask_decoder
        sam_prompt_encoder sam_vision_model sapiens2_head slanext_vision step3p5_vision
        tipsv2_dpt tipsv2_text_model tipsv2_vision_model unlimited_ocr_sam_vision_model
        unlimited_ocr_text unlimited_ocr_vision unlimited_ocr_vision_encoder
        vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder
        vibevoice_acoustic_tokenizer_encoder vibevoice_diffusion video_llama_3_vision
        videoprism_text_model videoprism_vision_model vitpose_backbone voxtral_encoder
        voxtral_realtime_encoder voxtral_realtime_text xclip_text_model xclip_vision_model
    """,
    "has several parts, with inputs that its processor makes": """
        EvollaModel align bridgetower canary chameleon clap clipseg
        cohere_asr colmodernvbert colpali colqwen2 cosmos3_edge cosmos3_omni deepseek_ocr2
        deepseek_vl_hybrid ernie4_5_vl_moe evolla exaone4_5 flava fun_asr_nano
        glm5_next glm_image glmasr glmga granite4_vision
        granite_docling granite_speech granite_speech_plus groupvit hunyuan_vl
        hyperclovax_vision_v2 idefics instructblipvideo janus kimi_k25 kosmos-2 kosmos-2.5
        kyutai_speech_to_text lxmert minicpm_ocr minicpmv4_6 minicpmv4_7 modernvbert molmo2
        moss_transcribe_diarize muse_glimmer muse_spark musicflamingo nemo_speechlm ovis2
        paddleocr_vl pe_audio pe_audio_video pe_video phi4_multimodal pi0 pix2struct
        pp_formulanet qianfan_ocr qwen2_5_omni qwen3_asr qwen3_omni_moe
        speech-encoder-decoder step3p7 tipsv2 udop ultravbert unlimited_ocr vibevoice_asr
        video_llama_3 video_llava videoprism voxtral_realtime xclip
    """,
    "predicts series of numbers": """
        autoformer decision_transformer informer patchtsmixer patchtst
        time_series_transformer timesfm timesfm2_5
    """,
    "makes sound, or codes of it": """
        bark clvp csm dia encodec fastspeech2_conformer fastspeech2_conformer_with_hifigan
        gradium_phonon_tts higgs_audio_v2 higgs_audio_v2_tokenizer mimi mimi_decoder
        mimi_encoder moshi musicgen_melody neucodec pocket_tts pocket_tts_audio_tokenizer
        pop2piano vibevoice vits xcodec xcodec2
    """,
    "is convolutions, with no linear to train but a head": """
        bit dac efficientnet fastspeech2_conformer_hifigan hgnet_v2 mobilenet_v1
        mobilenet_v2 poolformer pp_lcnet pp_lcnet_v3 pp_lcnet_v4 regnet resnet
        rt_detr_resnet speecht5_hifigan superpoint textnet univnet uvdoc uvdoc_backbone
    """,
    "finds or cuts out objects; its labels are boxes and masks": """
        conditional_detr d_fine dab-detr deformable_detr deimv2 detr edgetam edgetam_video
        eomt eomt_dinov3 grounding-dino lw_detr mask2former maskformer mm-grounding-dino
        omdet-turbo oneformer owlv2 owlvit pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4
        rf_detr rt_detr rt_detr_v2 sam sam2 sam2_video sam3 sam3_lite_text sam3_tracker
        sam3_tracker_video sam3_video sam_hq sapiens2 seggpt table-transformer tvp upernet
        videomt
    """,
    "needs a package beyond those of the project": """
        dinat fast_vlm gemma3n_vision layoutlmv2 layoutxlm perception_lm timm_backbone
        timm_wrapper
    """,
    "decides by the data, in Python, in its forward": "led longformer",
    "has no forward in plain PyTorch": "mra",
    "needs a retriever": "rag",
    "has a backward of its own": "reformer",
    "draws at random in its forward, whatever its config": "vilt",
    "its predictor does nothing for the loss": "vjepa2",
    "not tried": """
        blt chmv2 depth_anything depth_pro diffusion_gemma dinov3_convnext donut-swin dpt
        efficientloftr embedding_gemma2 esmfold2 florence_vision gemma4_assistant
        gemma4_unified_assistant glpn granite_speech5_ctc jev lightglue mgp-str mobilevit
        mobilevitv2 moonshine_streaming muse_glimmer_assistant nemotron3_5_asr
        nemotron3_5_transcribe_word_timestamp nemotron3_diarization nemotron_asr_streaming
        neomme parakeet_rnnt parakeet_tdt perceiver pp_ocrv5_mobile_det
        pp_ocrv5_mobile_rec pp_ocrv5_server_det pp_ocrv5_server_rec pp_ocrv6_medium_det
        pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec prompt_depth_anything
        radio slanet slanext splinter step3p5 superglue swin2sr vitdet vitmatte vitpose
        zoedepth
    """,
}

NOT_TRIED: dict[str, str] = {
    model_type: reason for reason, types in REASONS.items() for model_type in types.split()
}
