"""How LightGBM's parameters are called here, and what is said of those that are no parameters here.

A test walks over LightGBM's own list: each of its names is a parameter here, or is answered in one line.
"""

from __future__ import annotations

from typing import Final

ALIASES: Final = {
    "rounds": (
        "num_iterations num_iteration n_iter nrounds max_iter num_tree num_trees num_round num_rounds n_estimators "
        "num_boost_round"
    ),
    "early_stopping": "early_stopping_round early_stopping_rounds n_iter_no_change",
    "eval_every": "metric_freq output_freq",
    "metric": "metrics metric_types",
    "objective": "app loss application objective_type",
    "boosting": "boost boosting_type",
    "device_type": "device",
    "seed": "random_seed random_state",
    "learning_rate": "eta shrinkage_rate",
    "num_leaves": "num_leaf max_leaf max_leaves max_leaf_nodes",
    "min_data_in_leaf": "min_data min_data_per_leaf min_child_samples min_samples_leaf",
    "min_sum_hessian_in_leaf": "min_sum_hessian min_sum_hessian_per_leaf min_hessian min_child_weight",
    "min_gain_to_split": "min_split_gain",
    "lambda_l1": "reg_alpha l1_regularization",
    "lambda_l2": "reg_lambda lambda l2_regularization",
    "max_delta_step": "max_tree_output max_leaf_output",
    "extra_trees": "extra_tree",
    "feature_fraction": "sub_feature colsample_bytree",
    "feature_fraction_bynode": "sub_feature_bynode colsample_bynode",
    "bagging_fraction": "sub_row subsample bagging",
    "bagging_freq": "subsample_freq",
    "bagging_seed": "bagging_fraction_seed",
    "pos_bagging_fraction": "pos_sub_row pos_subsample pos_bagging",
    "neg_bagging_fraction": "neg_sub_row neg_subsample neg_bagging",
    "drop_rate": "rate_drop",
    "max_bin": "max_bins",
    "monotone_constraints": "mc monotone_constraint monotonic_cst",
    "monotone_constraints_method": "monotone_constraining_method mc_method",
    "monotone_penalty": "monotone_splits_penalty ms_penalty mc_penalty",
    "feature_contri": "feature_contrib fc fp feature_penalty",
    "is_unbalance": "unbalance unbalanced_sets",
}
"""What LightGBM, its scikit-learn class and XGBoost call a parameter."""

OBJECTIVE_ALIASES: Final = {
    "l2": "regression regression_l2 mean_squared_error mse l2_root root_mean_squared_error rmse",
    "l1": "regression_l1 mean_absolute_error mae",
    "mape": "mean_absolute_percentage_error",
    "multiclass": "softmax",
}

ELSEWHERE: Final = {
    "is set by train.cpus_per_worker": "num_threads num_thread nthread nthreads n_jobs",
    "is set by train.workers: several train data-parallel": (
        "tree_learner tree tree_type tree_learner_type num_machines num_machine machines workers nodes local_listen_port "
        "local_port port machine_list_filename machine_list_file machine_list mlist time_out pre_partition "
        "is_pre_partition"
    ),
    "is set by train.gpu: each worker sees one GPU": "num_gpu gpu_device_id gpu_device_id_list gpu_platform_id",
    "is known from the section data": (
        "data train train_data train_data_file data_filename valid test valid_data valid_data_file test_data "
        "test_data_file valid_filenames header has_header ignore_column ignore_feature blacklist"
    ),
    "is known from the section task": (
        "task task_type label_column label num_class num_classes weight_column weight group_column group group_id "
        "query_column query query_id"
    ),
    "is known from the columns' kinds: data.kinds": (
        "categorical_feature cat_feature categorical_column cat_column categorical_features"
    ),
    "is always on here": "deterministic",
    "is chosen here from the size of the data": "force_col_wise force_row_wise",
    "is fixed here, so that all workers have the same bins": (
        "feature_pre_filter bin_construct_sample_cnt subsample_for_bin data_random_seed data_seed enable_bundle "
        "is_enable_bundle bundle is_enable_sparse is_sparse enable_sparse sparse two_round two_round_loading "
        "use_two_round_loading"
    ),
    "goes with LightGBM's own files, which are not read or written here": (
        "config config_file input_model model_input model_in output_model model_output model_out snapshot_freq "
        "save_period save_binary is_save_binary is_save_binary_file parser_config_file precise_float_parser convert_model "
        "convert_model_file convert_model_language saved_feature_importance_type output_result predict_result "
        "prediction_result predict_name prediction_name pred_name name_pred forcedsplits_filename fs "
        "forced_splits_filename forced_splits_file forced_splits forcedbins_filename"
    ),
    "is said when predicting, not when training": (
        "start_iteration_predict num_iteration_predict predict_raw_score is_predict_raw_score predict_rawscore raw_score "
        "predict_leaf_index is_predict_leaf_index leaf_index predict_contrib is_predict_contrib contrib "
        "predict_disable_shape_check pred_early_stop pred_early_stop_freq pred_early_stop_margin"
    ),
    "is what the log and metrics.jsonl tell": (
        "verbosity verbose is_provide_training_metric training_metric is_training_metric train_metric first_metric_only "
        "eval_at ndcg_eval_at ndcg_at map_eval_at map_at multi_error_top_k auc_mu_weights"
    ),
    "needs all raw rows in one process": "linear_tree linear_trees linear_lambda",
    "is not supported here": (
        "lambdarank_position_bias_regularization label_gain objective_seed bagging_by_query cegb_tradeoff cegb_penalty_split "
        "cegb_penalty_feature_lazy cegb_penalty_feature_coupled top_k topk histogram_pool_size hist_pool_size sigmoid "
        "early_stopping_min_delta"
    ),
}
"""What is said of LightGBM's other parameters."""


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: key for key, names in table.items() for name in names.split()}


CALLED: Final = _by_name(ALIASES)
OBJECTIVE_CALLED: Final = _by_name(OBJECTIVE_ALIASES)
ANSWERS: Final = _by_name(ELSEWHERE)
